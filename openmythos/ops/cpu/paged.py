"""Attention to pages on a CPU: a C++ kernel that reads them where they lie.

Gathering copies all keys and values of every row first. Which is faster, this or gathering, depends
on the processor and the shape, and is measured: ``beats_gather``. The reference is
``ops.paged.paged_attention_reference``.
"""

import functools

import torch
from torch import Tensor

from openmythos.ops.cpu import build as native
from openmythos.ops.cpu.choice import Timing, ours_wins, race
from openmythos.ops.paged import Pools, paged_attention

RACE_ROWS, RACE_LENGTH = 8, 256  # rows of so many tokens
RACE_CALLS = 20  # that are timed together: one takes some tenths of a millisecond


def load() -> bool:
    """Load the kernel, as ``native.load``; the compiler then knows its shapes."""
    if not native.load("paged"):
        return False
    _register_fake()
    return True


@functools.cache
def _register_fake() -> None:
    torch.library.register_fake("openmythos_paged::attend", _fake)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor, scale: float, width: int
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], width)


def takes(pools: Pools) -> bool:
    """Whether the kernel can be used for these pools."""
    plain = all(pool.dtype == torch.float32 and pool.device.type == "cpu" for pool in pools)
    return plain and load()


def beats_gather(pools: Pools, num_heads: int) -> bool:
    """Whether the kernel is to be used for these pools and so many query heads per row."""
    if not takes(pools):
        return False
    (_, page, groups, width), v_width = pools[0].shape, pools[-1].shape[-1]
    shape = f"{num_heads} heads on {groups} of {width} and {v_width}"
    latent = ", latents" if len(pools) == 1 else ""
    run = functools.partial(_race, pools, num_heads)
    return ours_wins(f"attention to pages of {page} tokens, {shape}{latent}", run)


def _race(pools: Pools, num_heads: int) -> Timing:
    page, width = pools[0].shape[1], pools[0].shape[3]
    per_row = -(-RACE_LENGTH // page)
    some = tuple(torch.ones(RACE_ROWS * per_row, *pool.shape[1:]) for pool in pools)
    q = torch.ones(RACE_ROWS, num_heads, width)
    table = torch.arange(RACE_ROWS * per_row).view(RACE_ROWS, per_row)
    case = q, some, table, torch.full((RACE_ROWS,), RACE_LENGTH), 1.0
    calls = range(RACE_CALLS)
    return race(
        lambda: [paged_attention(*case, native=True) for _ in calls],
        lambda: [paged_attention(*case) for _ in calls],
        RACE_CALLS,
    )
