"""The loop: the state of rows that loop, one loop of it, and all loops of a forward.

Whatever runs a looped model goes through ``advance``: a forward, which aligns its rows at their
last loop, a generator, which aligns them at their first, traces and experiments.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.model.context import ForwardContext, Recent
from openmythos.model.halting import Halting, Tracker


class LoopedModel(nn.Module, abc.ABC):
    """What a loop needs of a model."""

    halting: Halting | None

    @abc.abstractmethod
    def init_state(
        self,
        e: Float[Tensor, "B T D"],
        generator: torch.Generator | None = None,
        ctx: ForwardContext | None = None,
    ) -> Float[Tensor, "B T D"]:
        """h_0."""

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
        """What the halting head says of a loop, from the states before and after it."""


Memory = tuple[Tensor, ...]


@dataclass(frozen=True)
class ExitState:
    """What an exit rule remembers of each row: the loops taken so far, and tensors of its own.

    A tensor of logits is one column wide before the first loop; it stands for a uniform prediction.
    """

    loops: Int[Tensor, "B"]
    memory: Memory = ()

    def select(self, index: Int[Tensor, "N"]) -> "ExitState":
        """Some of the rows."""
        return ExitState(self.loops[index], tuple(tensor[index] for tensor in self.memory))


@dataclass(frozen=True)
class Halted:
    """What the halting head gave out, after the newest loop.

    A row that goes on gives ``weight`` to the newest state; one that ends gives it what is left.
    Which of the two is known only later, so the newest state is not in ``mixed`` yet.

    Attributes:
        mixed: The mixture of the states before the newest.
        before: The account before the newest loop.
        prob: The head's exit probability of the newest loop; None before the first.
        weight: Of the newest loop, if the row goes on.
        tracker: The account after the newest loop, if the row goes on.
    """

    mixed: Float[Tensor, "B T D"]
    before: Tracker
    prob: Float[Tensor, "B T"]
    weight: Float[Tensor, "B T"]
    tracker: Tracker

    @staticmethod
    def start(halting: Halting, h: Float[Tensor, "B T D"]) -> "Halted":
        """Before the first loop nothing is given out."""
        tracker = halting.start(h)
        return Halted(torch.zeros_like(h), tracker, tracker.mass, tracker.mass, tracker)

    def ended(self, halting: Halting) -> tuple[Float[Tensor, "B T"], Tracker]:
        """The newest loop's weight and the account, if the rows end here."""
        return halting.step(self.before, self.prob, last=True)

    def select(self, index: Int[Tensor, "N"]) -> "Halted":
        """Some of the rows."""
        return Halted(
            self.mixed[index],
            self.before.select(index),
            self.prob[index],
            self.weight[index],
            self.tracker.select(index),
        )

    def put(self, index: Int[Tensor, "N"], rows: "Halted") -> "Halted":
        """These rows in place of those at ``index``."""
        return Halted(
            self.mixed.index_copy(0, index, rows.mixed),
            self.before.put(index, rows.before),
            self.prob.index_copy(0, index, rows.prob),
            self.weight.index_copy(0, index, rows.weight),
            self.tracker.put(index, rows.tracker),
        )


@dataclass(frozen=True)
class LoopState:
    """Rows that loop, each at its own loop. It is replaced by ``advance`` and never changed.

    Attributes:
        h: The state.
        e: The prelude's output, as the injection adds it.
        loop_idx: The next loop of every row, from 0; a row waits as long as it is negative.
        loops: The same on the host, so that choosing rows does not wait for the device.
        depths: The loops that every row may take.
        halted: Of the halting head, if the model has one.
        exits: Of an exit rule, if one decides.
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
        """Some of the rows."""
        index = torch.tensor(rows, device=self.h.device)
        recent = self.recent
        if recent is not None:
            recent = tuple(tuple(part[:, index] for part in layer) for layer in recent)
        return LoopState(
            h=self.h[index],
            e=self.e[index],
            loop_idx=self.loop_idx[index],
            loops=tuple(self.loops[row] for row in rows),
            depths=tuple(self.depths[row] for row in rows),
            halted=None if self.halted is None else self.halted.select(index),
            exits=None if self.exits is None else self.exits.select(index),
            recent=recent,
        )

    def _put(self, rows: Sequence[int], part: "LoopState") -> "LoopState":
        """``part`` in place of these rows, which have advanced; the others have waited a loop."""
        index, recent = torch.tensor(rows, device=self.h.device), self.recent
        if recent is not None and part.recent is not None:
            pairs = zip(recent, part.recent, strict=True)
            recent = tuple(
                tuple(old.index_copy(1, index, new) for old, new in zip(*layer, strict=True))
                for layer in pairs
            )
        halted = self.halted
        if halted is not None and part.halted is not None:
            halted = halted.put(index, part.halted)
        return replace(
            self,
            h=self.h.index_copy(0, index, part.h),
            loop_idx=self.loop_idx + 1,
            loops=tuple(loop + 1 for loop in self.loops),
            halted=halted,
            recent=recent,
        )


def start_loops(
    model: LoopedModel,
    e: Float[Tensor, "B T D"],
    ctx: ForwardContext,
    depths: Sequence[int],
    *,
    wait: bool = False,
    generator: torch.Generator | None = None,
) -> LoopState:
    """The state before the first loop.

    Args:
        model: Whose loop.
        e: Of ``model.encode``.
        ctx: Of the rows.
        depths: Loops that each row may take.
        wait: Rows end at once, so that a row of fewer loops than the deepest waits before its
            first; otherwise they begin at once.
        generator: Seeds a random initial state.
    """
    h = model.init_state(e, generator, ctx)
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
    """One step, and what the halting head says of it: the part of a loop that is compiled."""
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
) -> LoopState:
    """One loop of every row; rows whose first loop has not come wait and cost nothing.

    Args:
        model: Whose loop.
        state: Before the loop.
        ctx: Of the same rows.
        run: ``run_loop``, or what a compiler made of it.
    """
    running = [row for row, loop in enumerate(state.loops) if loop >= 0]
    if len(running) < len(state.loops):
        part = ctx.at_loop(None, None).select(running)
        return state._put(running, advance(model, state.select(running), part, run))
    together = state.loops[0] if len(set(state.loops)) == 1 else None
    here = ctx.at_loop(together, state.recent)
    h, halted = run(model, state.h, state.e, state.loop_idx, here, state.halted)
    return replace(
        state,
        h=h,
        loop_idx=state.loop_idx + 1,
        loops=tuple(loop + 1 for loop in state.loops),
        halted=halted,
        recent=here.newest_loops(),
    )


def unroll(
    model: LoopedModel,
    state: LoopState,
    ctx: ForwardContext,
    grad_loops: int | None = None,
) -> Iterator[LoopState]:
    """The states after every loop, until all rows have taken their depth.

    Args:
        model: Whose loop.
        state: Of ``start_loops``; its rows end at once.
        ctx: Of the same rows.
        grad_loops: Only the last loops get gradients (truncated back-propagation); None: all.
    """
    num_loops = max(d - l for d, l in zip(state.depths, state.loops, strict=True))
    grad_from = 0 if grad_loops is None else num_loops - grad_loops
    for loop in range(num_loops):
        with torch.set_grad_enabled(torch.is_grad_enabled() and loop >= grad_from):
            state = advance(model, state, ctx)
        yield state


def readout(model: LoopedModel, state: LoopState) -> Float[Tensor, "B T D"]:
    """What ``decode`` reads if the rows end here: the state, or the head's mixture of states."""
    halting, halted = model.halting, state.halted
    if halting is None or halted is None or not halting.mixes_states:
        return state.h
    weight, _ = halted.ended(halting)
    return halting.mix(halted.mixed, state.h, weight)
