"""Products of few rows on a CPU: a C++ kernel that reads the weights in one stream.

Decoding multiplies one or a few rows by every weight of the model, so its time is that of reading
them. Which is faster, this or torch's product, depends on the processor and the shape, and is
measured: ``beats_linear`` and ``beats_experts``. The references are ``linear`` of torch and
``ops.moe.gathered_experts``.
"""

import functools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from openmythos.ops.cpu import build as native
from openmythos.ops.cpu.choice import Timing, ours_wins, race
from openmythos.ops.moe import gathered_experts

MAX_ROWS = 8  # beyond, the library's blocked product is faster
POOL_BYTES, MAX_POOL = 1 << 26, 256  # of matrices that a race goes through: they come from memory


def load() -> bool:
    """Load the kernels, as ``native.load``; the compiler then knows their shapes."""
    if not native.load("narrow"):
        return False
    _register_fakes()
    return True


@functools.cache
def _register_fakes() -> None:
    torch.library.register_fake("openmythos_narrow::linear", _fake_linear)
    torch.library.register_fake("openmythos_narrow::experts", _fake_experts)


def _fake_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_experts(
    x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    return torch.empty_like(x)


def linear(x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "... O"]:
    """``x weight^T`` for at most ``MAX_ROWS`` rows of fp32 on a CPU, after ``load``."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    y = torch.ops.openmythos_narrow.linear(flat, weight.contiguous())
    return y.view(*x.shape[:-1], len(weight))


def experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E _ D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """As ``gathered_experts``, after ``load``."""
    packed = x.contiguous(), expert.contiguous(), weight.contiguous()
    return torch.ops.openmythos_narrow.experts(*packed, gate_up.contiguous(), down.contiguous())


# --- which is faster ------------------------------------------------------------------------------


def beats_linear(rows: int, outer: int, inner: int) -> bool:
    """Whether ``linear`` is to be used for so many rows and weights [outer, inner]."""
    race = functools.partial(_race_linear, rows, outer, inner)
    return ours_wins(f"linear {outer} x {inner}, rows {rows}", race)


def beats_experts(rows: int, slots: int, width: int, dim: int) -> bool:
    """Whether ``experts`` is to be used for so many rows, experts per row, and their widths."""
    race = functools.partial(_race_experts, rows, slots, width, dim)
    return ours_wins(f"experts {slots} of {width} x {dim}, rows {rows}", race)


def _race_linear(rows: int, outer: int, inner: int) -> Timing:
    x = torch.ones(rows, inner)
    weights = [torch.ones(outer, inner) for _ in range(_pool_size(outer * inner))]
    return race(
        lambda: [linear(x, weight) for weight in weights],
        lambda: [functional.linear(x, weight) for weight in weights],
        len(weights),
    )


@torch.no_grad()
def _race_experts(rows: int, slots: int, width: int, dim: int) -> Timing:
    num_experts = max(_pool_size(3 * width * dim), rows * slots)
    x, share = torch.ones(rows, dim), torch.ones(rows, slots)
    weights = torch.ones(num_experts, 2 * width, dim), torch.ones(num_experts, dim, width)
    chosen = torch.arange(num_experts).split(rows * slots)[: num_experts // (rows * slots)]
    theirs = torch.compile(gathered_experts, dynamic=False)
    cases = [(x, expert.view(rows, slots), share, *weights) for expert in chosen]
    return race(
        lambda: [experts(*case) for case in cases],
        lambda: [theirs(*case) for case in cases],
        len(cases),
    )


def _pool_size(num_weights: int) -> int:
    return min(max(POOL_BYTES // (4 * num_weights), 1), MAX_POOL)
