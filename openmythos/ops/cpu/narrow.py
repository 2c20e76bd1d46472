"""Products of few rows on a CPU: a C++ kernel that reads the weights in one stream.

Decoding multiplies one or a few rows by every weight of the model, so its time is that of reading
them. The library's matrix-vector product walks through several rows of a matrix at once, which
reads memory at less than half the speed of one straight pass. Its reference is ``linear`` of torch.
"""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.ops.cpu import build as native

MAX_ROWS = 8  # beyond, the library's blocked product is faster


@functools.cache
def load() -> bool:
    """Load the kernels, as ``native.load``; the compiler then knows their shapes."""
    if not native.load("narrow"):
        return False
    torch.library.register_fake("openmythos_narrow::linear", _fake_linear)
    torch.library.register_fake("openmythos_narrow::experts", _fake_experts)
    return True


def linear(x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "... O"]:
    """``x weight^T`` for at most ``MAX_ROWS`` rows of fp32 on a CPU, after ``load``."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.ops.openmythos_narrow.linear(flat, weight.contiguous())
    return y.view(*x.shape[:-1], -1)


def experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E _ D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """As ``ops.moe.gathered_experts``, after ``load``."""
    return torch.ops.openmythos_narrow.experts(
        x.contiguous(), expert.contiguous(), weight.contiguous(), gate_up, down
    )


def _fake_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_experts(
    x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    return torch.empty_like(x)
