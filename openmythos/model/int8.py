"""A model's weights in 8 bits: what stands in a module where its matrix was.

``Int8Weight`` takes the matrix's place, as ``layer.weight``, and the functions that multiply by it
(``linear``, ``embedding``, ``bmm`` of heads) hand their call to it: the model's code is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn
from torch.nn import functional

from openmythos.model.feedforward import MoE, Router
from openmythos.model.injection import LinearInjection, LTIInjection
from openmythos.ops.cpu import int8
from openmythos.ops.int8 import dequantise, quantise

MIN_CHANNELS = 16  # a matrix of fewer output channels keeps its dtype


def int8_names(model: nn.Module) -> set[str]:
    """The parameters of a model that can be in 8 bits: matrices of layers, tables, experts.

    Not norms, biases and other vectors, LoRA per loop, and what chooses experts or halts a token.
    """
    matrices = (
        (prefix, module, name)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and parameter.shape[-2] >= MIN_CHANNELS
    )
    return {f"{prefix}.{name}" for prefix, module, name in matrices if _takes_int8(module, name)}


def _takes_int8(module: nn.Module, name: str) -> bool:
    if isinstance(module, nn.Linear | nn.Embedding):
        return name == "weight" and not isinstance(module, Router)
    return isinstance(module, MoE | LinearInjection | LTIInjection)


class Int8Weight(nn.Module):
    """A matrix, or one per expert: integers of 8 bits, and one scale per output channel."""

    requires_grad = False

    def __init__(self, values: Int8[Tensor, "*C I"], scale: Float[Tensor, "*C"]) -> None:
        super().__init__()
        self.values: Tensor
        self.scale: Tensor
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @classmethod
    def put(cls, module: nn.Module, name: str, weight: Float[Tensor, "*C I"]) -> None:
        """The nearest weights in 8 bits in place of a module's parameter.

        Raises:
            ValueError: A weight that fp32 cannot hold.
        """
        made = cls(*quantise(weight))
        delattr(module, name)
        setattr(module, name, made)

    @property
    def shape(self) -> torch.Size:
        """As of the matrix."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is multiplied with."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """As of the matrix."""
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def view(self, num_heads: int, *_: int) -> "Int8Heads":
        """The matrix as one of each head."""
        by_head = self.values.view(num_heads, -1, self.values.shape[-1])
        return Int8Heads(by_head, self.scale.view(num_heads, -1), 0, by_head.shape[1])

    def experts(
        self,
        down: "Int8Weight",
        x: Float[Tensor, "N D"],
        expert: Int[Tensor, "N K"],
        weight: Float[Tensor, "N K"],
        counts: Int[Tensor, "E"],
    ) -> Float[Tensor, "N D"]:
        """As ``ops.moe.moe_experts``, of which these are the weights ``gate_up``."""
        return int8.experts(x, expert, weight, self.values, self.scale, down.values, down.scale)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Tensor:
        x, weight, *others = args
        if func is functional.linear:
            y = int8.linear(x, weight.values, weight.scale)
            bias = others[0] if others else (kwargs or {}).get("bias")
            return y if bias is None else y + bias
        if func is functional.embedding:
            return dequantise(weight.values[x], weight.scale[x])
        raise TypeError(f"{getattr(func, '__name__', func)} does not take weights in 8 bits")


@dataclass(frozen=True)
class Int8Heads:
    """Some channels of each head, for ``bmm``; ``turned``: transposed."""

    values: Int8[Tensor, "H C I"]
    scale: Float[Tensor, "H C"]
    first: int
    count: int
    turned: bool = False

    def split(self, counts: Sequence[int], dim: int) -> "list[Int8Heads]":
        """As of a tensor, along the channels."""
        assert dim == 1
        assert sum(counts) == self.count
        starts = [self.first + sum(counts[:part]) for part in range(len(counts))]
        pairs = zip(starts, counts, strict=True)
        return [Int8Heads(self.values, self.scale, first, count) for first, count in pairs]

    @property
    def mT(self) -> "Int8Heads":
        """As of a tensor."""
        return Int8Heads(self.values, self.scale, self.first, self.count, not self.turned)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Tensor:
        if func is not torch.bmm:
            raise TypeError(f"{getattr(func, '__name__', func)} does not take heads in 8 bits")
        x, w = args
        if w.turned:
            return int8.heads(x, w.values, w.scale, w.first, w.count)
        return int8.absorb(x, w.values, w.scale, w.first)
