"""The loop: the state of looping rows, one loop (``advance``) and all loops (``unroll``).

Everything that runs a looped model uses ``advance``: a forward, whose rows end at the same time, a
generator, whose rows begin at the same time, traces and experiments.
"""

import abc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass, tree_map
from torch.utils.checkpoint import checkpoint

from openmythos.model.context import ForwardContext, Recent, select_rows
from openmythos.model.halting import Halting, Tracker


class LoopedModel(nn.Module, abc.ABC):
    """The methods of a model that the loop calls."""

    halting: Halting | None

    @abc.abstractmethod
    def init_state(self, e: Float[Tensor, "B T D"], ctx: ForwardContext) -> Float[Tensor, "B T D"]:
        """The initial state h_0."""

    @abc.abstractmethod
    def step(
        self,
        h: Float[Tensor, "B T D"],
        e: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B T D"]:
        """The state after one loop; rows may be at different loops, which count from 0."""

    @abc.abstractmethod
    def exit_prob(
        self,
        before: Float[Tensor, "B T D"],
        after: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B T"]:
        """The halting head's probability for a loop, from the states before and after it."""


Memory = tuple[Tensor, ...]


@dataclass(frozen=True)
class ExitState:
    """What an exit rule remembers per row: the number of loops taken, and the rule's own tensors.

    Remembered logits are a single column of zeros ``[B 1]`` before the first loop: a uniform
    prediction.
    """

    loops: Int[Tensor, "B"]
    memory: Memory = ()


@dataclass(frozen=True)
class Halted:
    """The halting head's results after the latest loop.

    The latest state has ``weight`` if the row continues, and the remainder if it ends. Which of the
    two is not known yet, so ``mixed`` does not include the latest state.

    Attributes:
        mixed: The mixture of the states before the latest.
        before: The tracker before the latest loop.
        prob: The head's halting probability at the latest loop; 0 before the first.
        weight: The latest loop's weight if the row continues.
        tracker: The tracker after the latest loop if the row continues.
    """

    mixed: Float[Tensor, "B T D"]
    before: Tracker
    prob: Float[Tensor, "B T"]
    weight: Float[Tensor, "B T"]
    tracker: Tracker

    @staticmethod
    def start(halting: Halting, h: Float[Tensor, "B T D"]) -> "Halted":
        """Before the first loop: an empty mixture and weights of 0."""
        tracker = halting.start(h)
        return Halted(torch.zeros_like(h), tracker, tracker.mass, tracker.mass, tracker)

    def ended(self, halting: Halting) -> tuple[Float[Tensor, "B T"], Tracker]:
        """The latest loop's weight and the tracker if the rows end here."""
        return halting.step(self.before, self.prob, last=True)


for part in (ExitState, Tracker, Halted):
    register_dataclass(part)


def put_rows(part: Any, index: Int[Tensor, "N"], rows: Any, dim: int = 0) -> Any:
    """A copy of ``part`` in whose tensors ``rows`` replace those at ``index``, along ``dim``."""
    put = lambda old, new: None if old is None else old.index_copy(dim, index, new)  # noqa: E731
    return tree_map(put, part, rows)


@dataclass(frozen=True)
class LoopState:
    """The state of looping rows, each at its own loop. ``advance`` returns a new one.

    Attributes:
        h: The model's state.
        e: The result of ``model.encode``: the prelude's output, prepared by the injection.
        loop_idx: The next loop of each row, from 0; a row waits while it is negative.
        loops: The same numbers on the host, so that selecting rows needs no device sync.
        depths: The number of loops that each row may take.
        halted: The halting head's results, if the model has one.
        exits: The exit rule's state, if there is one.
        recent: The keys and values of the last loops, for depth attention without a cache.
    """

    h: Float[Tensor, "B T D"]
    e: Float[Tensor, "B T D"]
    loop_idx: Int[Tensor, "B"]
    loops: tuple[int, ...]
    depths: tuple[int, ...]
    halted: Halted | None = None
    exits: ExitState | None = None
    recent: Recent | None = None

    def select(self, rows: Sequence[int]) -> "LoopState":
        """The state of some of the rows."""
        index = torch.tensor(rows, device=self.h.device)
        return LoopState(
            h=self.h[index],
            e=self.e[index],
            loop_idx=self.loop_idx[index],
            loops=tuple(self.loops[row] for row in rows),
            depths=tuple(self.depths[row] for row in rows),
            halted=select_rows(self.halted, index),
            exits=select_rows(self.exits, index),
            recent=select_rows(self.recent, index, dim=1),
        )

    def _put(self, rows: Sequence[int], part: "LoopState") -> "LoopState":
        """Replace these rows by ``part``, which has advanced; the others have waited one loop."""
        index = torch.tensor(rows, device=self.h.device)
        return replace(
            self,
            h=self.h.index_copy(0, index, part.h),
            loop_idx=self.loop_idx + 1,
            loops=tuple(loop + 1 for loop in self.loops),
            halted=put_rows(self.halted, index, part.halted),
            recent=put_rows(self.recent, index, part.recent, dim=1),
        )


def start_loops(
    model: LoopedModel,
    e: Float[Tensor, "B T D"],
    ctx: ForwardContext,
    depths: Sequence[int],
    *,
    wait: bool = False,
) -> LoopState:
    """The state before the first loop.

    Args:
        model: The model that loops.
        e: The result of ``model.encode``.
        ctx: The context of the rows.
        depths: The number of loops that each row may take.
        wait: If true, all rows end at the same time: a row with fewer loops than the deepest waits
            before its first. Otherwise all begin at the same time.
    """
    h = model.init_state(e, ctx)
    loops = tuple(depth - max(depths) if wait else 0 for depth in depths)
    return LoopState(
        h=h,
        e=e,
        loop_idx=torch.tensor(loops, device=h.device),
        loops=loops,
        depths=tuple(depths),
        halted=None if model.halting is None else Halted.start(model.halting, h),
        recent=ctx.recent,
    )


def run_loop(
    model: LoopedModel,
    h: Float[Tensor, "B T D"],
    e: Float[Tensor, "B T D"],
    loop_idx: Int[Tensor, "B"],
    ctx: ForwardContext,
    halted: Halted | None,
) -> tuple[Float[Tensor, "B T D"], Halted | None]:
    """One step and the halting head's results for it; this part of a loop can be compiled."""
    before, h = h, model.step(h, e, loop_idx, ctx)
    if halted is None or model.halting is None:
        return h, None
    prob = model.exit_prob(before, h, loop_idx, ctx)
    mixed = halted.mixed
    if model.halting.mixes_states:
        mixed = model.halting.mix(mixed, before, halted.weight)
    weight, tracker = model.halting.step(halted.tracker, prob, last=False)
    return h, Halted(mixed, halted.tracker, prob, weight, tracker)


def advance(
    model: LoopedModel,
    state: LoopState,
    ctx: ForwardContext,
    run: Callable[..., Any] = run_loop,
    grad: bool = True,
    recompute: bool = False,
) -> LoopState:
    """Run one loop of every row; waiting rows (negative ``loop_idx``) are not computed.

    Args:
        model: The model that loops.
        state: The state before the loop.
        ctx: The context of the same rows.
        run: ``run_loop``, or a compiled version of it.
        grad: False runs the loop without gradients. Those of rows that only wait pass it by.
        recompute: Keep only the arguments for the backward pass, which runs the loop again.
    """
    running = [row for row, loop in enumerate(state.loops) if loop >= 0]
    if len(running) < len(state.loops):
        part = ctx.at_loop(None, None).select(running)
        return state._put(
            running, advance(model, state.select(running), part, run, grad, recompute)
        )
    together = state.loops[0] if len(set(state.loops)) == 1 else None
    passes = itertools.count()

    def body() -> tuple[Tensor, Halted | None, Recent | None]:
        inside = ctx.at_loop(together, state.recent)
        if recompute:
            counts = state.loop_idx.new_full((), next(passes) == 0)
            inside = replace(inside, shared={}, counts=counts)
        h, halted = run(model, state.h, state.e, state.loop_idx, inside, state.halted)
        return h, halted, inside.newest_loops()

    with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
        keep = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        h, halted, recent = keep(body) if recompute else body()
    return replace(
        state,
        h=h,
        loop_idx=state.loop_idx + 1,
        loops=tuple(loop + 1 for loop in state.loops),
        halted=halted,
        recent=recent,
    )


def unroll(
    model: LoopedModel,
    state: LoopState,
    ctx: ForwardContext,
    grad_loops: int | None = None,
    recompute: bool = False,
) -> Iterator[LoopState]:
    """Yield the state after every loop, until all rows have taken all their loops.

    Args:
        model: The model that loops.
        state: The result of ``start_loops``, with rows that end at the same time.
        ctx: The context of the same rows.
        grad_loops: Number of last loops with gradients (gradient truncation); None: all.
        recompute: See ``advance``.
    """
    num_loops = max(d - l for d, l in zip(state.depths, state.loops, strict=True))
    grad_from = 0 if grad_loops is None else num_loops - grad_loops
    for loop in range(num_loops):
        state = advance(model, state, ctx, grad=loop >= grad_from, recompute=recompute)
        yield state


def readout(model: LoopedModel, state: LoopState) -> Float[Tensor, "B T D"]:
    """The input of ``decode`` if the rows end here: the state, or the head's mixture of states."""
    halting, halted = model.halting, state.halted
    if halting is None or halted is None or not halting.mixes_states:
        return state.h
    weight, _ = halted.ended(halting)
    return halting.mix(halted.mixed, state.h, weight)
