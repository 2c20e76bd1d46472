"""Weights in 8 bits: one scale per output channel, and the products with them as references.

A channel's scale maps its largest weight to 127, so that a weight is off by at most half a scale.
The references widen a part of the weights at a time: never a whole matrix. ``ops.cpu.int8`` has
kernels that read the integers themselves.
"""

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn import functional

from openmythos.ops.swiglu import swiglu

LARGEST = 127  # -128 is not used, so that both signs have the same numbers
WIDENED = 1 << 18  # weights that are widened at once: they stay in the processor's cache


def quantise(weight: Float[Tensor, "*C I"]) -> tuple[Int8[Tensor, "*C I"], Float[Tensor, "*C"]]:
    """Weights as integers, and the scale of each output channel in fp32.

    Raises:
        ValueError: A weight that fp32 cannot hold.
    """
    rows = weight.detach().flatten(0, -2)
    values = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    step = max(1, WIDENED // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        wide = rows[part].float()
        scale[part] = wide.abs().amax(dim=1) / LARGEST
        steps = wide / scale[part, None].where(scale[part, None] > 0, 1)
        values[part] = steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    if not bool(scale.isfinite().all()):
        raise ValueError("weights that are too large for torch.float32 cannot be stored in 8 bits")
    return values.view(weight.shape), scale.view(weight.shape[:-1])


def dequantise(values: Int8[Tensor, "*C I"], scale: Float[Tensor, "*C"]) -> Float[Tensor, "*C I"]:
    """The weights that the integers stand for, in the scale's dtype."""
    return values.to(scale.dtype) * scale[..., None]


def linear(
    x: Float[Tensor, "... I"], values: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "... O"]:
    """``x W^T``."""
    parts = values.split(max(1, WIDENED // max(1, values.shape[1])))
    products = [functional.linear(x, part.to(x.dtype)) for part in parts]
    return torch.cat(products, dim=-1) * scale.to(x.dtype)


def heads(
    x: Float[Tensor, "H N I"],
    values: Int8[Tensor, "H C I"],
    scale: Float[Tensor, "H C"],
    first: int,
    count: int,
) -> Float[Tensor, "H N O"]:
    """Each head's rows by ``count`` of its channels, the ``first`` and those after it."""
    part = slice(first, first + count)
    return _by_head(x, values[:, part].mT) * scale[:, None, part].to(x.dtype)


def absorb(
    x: Float[Tensor, "H N O"],
    values: Int8[Tensor, "H C I"],
    scale: Float[Tensor, "H C"],
    first: int,
) -> Float[Tensor, "H N I"]:
    """As ``heads``, but by the transpose of these channels: x has a column for each of them."""
    part = slice(first, first + x.shape[-1])
    return _by_head(x * scale[:, None, part].to(x.dtype), values[:, part])


def _by_head(x: Float[Tensor, "H N A"], values: Int8[Tensor, "H A B"]) -> Float[Tensor, "H N B"]:
    step = max(1, WIDENED // max(1, values[:1].numel()))
    parts = zip(x.split(step), values.split(step), strict=True)
    return torch.cat([torch.bmm(some, part.to(x.dtype)) for some, part in parts])


def gathered_experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    gate_up: Int8[Tensor, "E _ D"],
    gate_up_scale: Float[Tensor, "E _"],
    down: Int8[Tensor, "E D F"],
    down_scale: Float[Tensor, "E D"],
) -> Float[Tensor, "N D"]:
    """As ``ops.moe.gathered_experts``, for few tokens: it copies the weights that it widens."""
    wide = gate_up[expert].to(x.dtype) * gate_up_scale[expert][..., None].to(x.dtype)
    hidden = swiglu((wide * x[:, None, None, :]).sum(dim=-1)) * weight[..., None]
    wide = down[expert].to(x.dtype) * down_scale[expert][..., None].to(x.dtype)
    return (wide * hidden[:, :, None, :]).sum(dim=-1).sum(dim=1)
