"""Products with weights in 8 bits on a CPU: kernels that widen the integers in registers.

Memory then gives a quarter of the bytes. Which is faster, a kernel or torch with weights that are
widened for it, depends on the processor and the shapes, and is measured: ``beats_torch``. The
references are those of ``ops.int8``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from openmythos.ops import int8 as reference
from openmythos.ops.cpu import build as native
from openmythos.ops.cpu.choice import Timing, ours_wins, race
from openmythos.ops.swiglu import swiglu

MAX_ROWS = 32  # beyond, widening a part of the weights for the library's product costs less
ABSORBED = 32  # channels that ``absorb`` reads at once; the kernel takes multiples of it
POOL_BYTES, MAX_POOL = 1 << 24, 256  # of matrices that a race goes through: they come from memory
Call = Callable[..., Tensor]


def load() -> bool:
    """Load the kernels, as ``native.load``; the compiler then knows their shapes."""
    if not native.load("narrow"):
        return False
    _register_fakes()
    return True


@functools.cache
def _register_fakes() -> None:
    fakes: dict[str, Call] = {
        "linear_int8": lambda x, values, scale: x.new_empty(x.shape[0], values.shape[0]),
        "heads_int8": lambda x, values, scale, first, count: x.new_empty(*x.shape[:2], count),
        "absorb_int8": lambda x, values, *_: x.new_empty(*x.shape[:2], values.shape[2]),
        "experts_int8": lambda x, *_: torch.empty_like(x),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"openmythos_narrow::{name}", fake)


# --- the kernels, after ``load`` ------------------------------------------------------------------


def _linear(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    y = torch.ops.openmythos_narrow.linear_int8(flat, values, scale)
    return y.view(*x.shape[:-1], len(values))


def _heads(x: Tensor, values: Tensor, scale: Tensor, first: int, count: int) -> Tensor:
    return torch.ops.openmythos_narrow.heads_int8(x.contiguous(), values, scale, first, count)


def _absorb(x: Tensor, values: Tensor, scale: Tensor, first: int) -> Tensor:
    return torch.ops.openmythos_narrow.absorb_int8(x.contiguous(), values, scale, first)


def _experts(x: Tensor, expert: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    packed = x.contiguous(), expert.contiguous(), weight.contiguous()
    return torch.ops.openmythos_narrow.experts_int8(*packed, *weights)


# What compiled code calls by the reference, and the kernel that takes its place.
KERNELS: dict[Call, Call] = {
    reference.linear: _linear,
    reference.heads: _heads,
    reference.absorb: _absorb,
    reference.gathered_experts: _experts,
}


# --- products -------------------------------------------------------------------------------------


def linear(
    x: Float[Tensor, "... I"], values: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "... O"]:
    """``reference.linear``, by the faster way."""
    return _faster(reference.linear, x, values, scale)


def heads(
    x: Float[Tensor, "H N I"],
    values: Int8[Tensor, "H C I"],
    scale: Float[Tensor, "H C"],
    first: int,
    count: int,
) -> Float[Tensor, "H N O"]:
    """``reference.heads``, by the faster way."""
    return _faster(reference.heads, x, values, scale, first, count)


def absorb(
    x: Float[Tensor, "H N O"],
    values: Int8[Tensor, "H C I"],
    scale: Float[Tensor, "H C"],
    first: int,
) -> Float[Tensor, "H N I"]:
    """``reference.absorb``, by the faster way."""
    return _faster(reference.absorb, x, values, scale, first)


def experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    gate_up: Int8[Tensor, "E _ D"],
    gate_up_scale: Float[Tensor, "E _"],
    down: Int8[Tensor, "E D F"],
    down_scale: Float[Tensor, "E D"],
) -> Float[Tensor, "N D"]:
    """``reference.gathered_experts``; of many tokens, those of an expert are one product."""
    weights = gate_up, gate_up_scale, down, down_scale
    if not native.eager() or beats_torch(reference.gathered_experts, x, expert, weight, *weights):
        return _faster(reference.gathered_experts, x, expert, weight, *weights)
    y = torch.zeros_like(x)
    for chosen in expert.unique().tolist():
        token, slot = (expert == chosen).nonzero(as_tuple=True)
        inner = linear(x[token], gate_up[chosen], gate_up_scale[chosen])
        hidden = swiglu(inner) * weight[token, slot, None]
        y.index_add_(0, token, linear(hidden, down[chosen], down_scale[chosen]))
    return y


def _faster(product: Call, *case: Any) -> Tensor:
    return (KERNELS[product] if native.eager() and beats_torch(product, *case) else product)(*case)


# --- which is faster ------------------------------------------------------------------------------


def beats_torch(product: Call, x: Tensor, *others: Any) -> bool:
    """Whether the kernel is to be used for a reference's arguments; ``x`` is their first.

    Inside the compiler they are its examples, whose sizes may be symbols.
    """
    case = x, *others
    tensors = [each for each in case if isinstance(each, Tensor)]
    if any(each.device.type != "cpu" for each in tensors) or any(
        each.is_floating_point() and each.dtype != torch.float32 for each in tensors
    ):
        return False
    by_head = product in (reference.heads, reference.absorb)
    rows = x.shape[1] if by_head else math.prod(x.shape[:-1])
    if not 0 < _size(rows) <= MAX_ROWS:
        return False
    if product is reference.absorb and others[0].shape[2] % ABSORBED:
        return False
    sizes = (tuple(map(_size, e.shape)) if isinstance(e, Tensor) else _size(e) for e in case)
    return _decided(product, tuple(sizes), torch.get_num_threads())


def _size(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


@functools.cache
def _decided(product: Call, sizes: tuple[Any, ...], num_threads: int) -> bool:
    if not load():
        return False
    shapes = ["x".join(map(str, size)) if isinstance(size, tuple) else str(size) for size in sizes]
    name = f"int8 {product.__name__} of {', '.join(shapes)}"
    return ours_wins(name, functools.partial(_race, product, sizes))


@torch.no_grad()
def _race(product: Call, sizes: Sequence[Any]) -> Timing:
    case = _case(product, sizes)
    tensors = (each for each in case if isinstance(each, Tensor))
    read = sum(each.nbytes for each in tensors if each.dtype == torch.int8)
    others = range(1, min(max(POOL_BYTES // max(read, 1), 1), MAX_POOL))
    cases = [case, *(_case(product, sizes) for _ in others)]
    kernel = KERNELS[product]
    return race(
        lambda: [kernel(*case) for case in cases],
        lambda: [product(*case) for case in cases],
        len(cases),
    )


def _case(product: Call, sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of these sizes, but of large weights only some channels and experts."""
    if product is not reference.gathered_experts:
        x, values, _, *rest = sizes
        inner = values[-1]
        if product is reference.linear:
            values = min(values[0], max(1, POOL_BYTES // max(inner, 1))), inner
        scale = torch.ones(values[:-1])
        return torch.ones(x), torch.ones(values, dtype=torch.int8), scale, *rest
    x, chosen, _, (_, *gate_up), _, (_, *down), _ = sizes
    expert = torch.arange(math.prod(chosen)).view(chosen)
    weights = (torch.ones(expert.numel(), *each, dtype=torch.int8) for each in (gate_up, down))
    scaled = ((values, torch.ones(values.shape[:-1])) for values in weights)
    return torch.ones(x), expert, torch.ones(chosen), *chain(*scaled)
