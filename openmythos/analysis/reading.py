"""The reading map: at which loop does the model read which token?

A column of tokens is corrupted during one loop only. During that loop the other tokens see the
column's state, e and value embeddings from a run on the corrupted text; before and after it, the
column is clean, and its own state stays clean throughout. How much of the answer moves is what that
loop has read there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from openmythos.analysis.bootstrap import defined, interval, resample
from openmythos.analysis.pairs import Pairs
from openmythos.model.context import ForwardContext
from openmythos.model.inference import inference
from openmythos.model.loop import LoopState, advance, readout, start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM

OF_COLUMNS = ("corrupted_at", "clean_at", "always", "whole", "counted")
CLEAR = 3.0  # standard errors above 0 from which on a column counts as read


@dataclass(frozen=True, kw_only=True)
class ReadingMap:
    """What the answer loses when a column is corrupted, per loop, column and example.

    The loss is the fall of logit(answer) - logit(counterfactual answer). Shares are ratios of the
    means over the examples that count, not means of ratios.

    Attributes:
        columns: The columns' names.
        corrupted_at: The loss if the column is corrupted at this loop only.
        clean_at: The loss if it is clean at this loop only.
        always: The loss if it is corrupted at all loops.
        whole: The loss if the text itself is corrupted, so that the prelude and the coda read it.
        counted: The examples that count.
        correct: Whether the clean text's answer is the most likely token.
    """

    columns: tuple[str, ...]
    corrupted_at: Float[Tensor, "L K N"]
    clean_at: Float[Tensor, "L K N"]
    always: Float[Tensor, "K N"]
    whole: Float[Tensor, "K N"]
    counted: Bool[Tensor, "K N"]
    correct: Bool[Tensor, "N"]

    @property
    def num_loops(self) -> int:
        """Number of loops, the rows of the map."""
        return len(self.corrupted_at)

    @property
    def accuracy(self) -> float:
        """Share of the clean texts that are answered right."""
        return float(self.correct.double().mean())

    @property
    def is_read(self) -> Bool[Tensor, "K"]:
        """Whether corrupting the column at all loops clearly moves the answer.

        If not, a share of that effect is a ratio of two noises, and undefined.
        """
        count = self.counted.sum(dim=1).clamp(min=1)
        mean = (self.always * self.counted).sum(dim=1) / count
        spread = ((self.always - mean[:, None]).square() * self.counted).sum(dim=1) / count
        return mean > CLEAR * (spread / count).sqrt()

    @property
    def necessity(self) -> Float[Tensor, "L K"]:
        """The share of the effect that one corrupted loop has; NaN if the column is not read."""
        return self.share(self.corrupted_at)[0]

    @property
    def sufficiency(self) -> Float[Tensor, "L K"]:
        """The share of the effect that one clean loop prevents; NaN if the column is not read."""
        return 1 - self.share(self.clean_at)[0]

    def share(
        self, loss: Float[Tensor, "L K N"], times: Float[Tensor, "S N"] | None = None
    ) -> Float[Tensor, "S L K"]:
        """Means of ``loss`` over means of ``always``; ``times`` says how often examples count."""
        if times is None:
            times = torch.ones(1, self.counted.shape[1], dtype=torch.float64)
        part = torch.einsum("sn,lkn->slk", times, loss * self.counted)
        always = torch.einsum("sn,kn->sk", times, self.always * self.counted)
        known = torch.where(self.is_read, always, torch.nan)
        return part / known[:, None]

    def to_dict(self, num_samples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """The map with intervals, ready for JSON: rows are loops; None where undefined."""
        times = resample(self.counted.shape[1], num_samples, seed)
        necessity, sufficiency = self.necessity, self.sufficiency
        counts = self.counted.sum(dim=1).clamp(min=1)
        kept = [(loss * self.counted).sum(1) / counts for loss in (self.always, self.whole)]
        return {
            "columns": list(self.columns),
            "num_loops": self.num_loops,
            "num_examples": self.counted.sum(dim=1).tolist(),
            "accuracy": self.accuracy,
            "necessity": _rows(necessity),
            "necessity_interval": _intervals(self.share(self.corrupted_at, times)),
            "sufficiency": _rows(sufficiency),
            "sufficiency_interval": _intervals(1 - self.share(self.clean_at, times)),
            "necessity_sum": [defined(value) for value in necessity.sum(dim=0).tolist()],
            "sufficiency_sum": [defined(value) for value in sufficiency.sum(dim=0).tolist()],
            "logits_through_loops": kept[0].tolist(),
            "logits_whole": kept[1].tolist(),
        }


def reading_map(
    model: RecurrentDepthLM, pairs: Pairs, num_loops: int, *, batch_size: int = 256
) -> ReadingMap:
    """Corrupt each column during each loop, and during all loops but each.

    Args:
        model: The model. An untied stack is measured through ``analysis.stack``.
        pairs: Clean and corrupted texts.
        num_loops: Loops to run. Surplus loops repair what a corrupted one has broken: measure at
            the fewest loops that suffice.
        batch_size: Texts that are run together. The states of about 3 (num_loops + 1) runs of them
            are kept at a time, and the logits of one.

    Raises:
        ValueError: ``num_loops`` or ``batch_size`` is below 1.
    """
    if num_loops < 1:
        raise ValueError(f"num_loops is {num_loops}; it must be at least 1")
    device = next(model.parameters()).device
    found = []
    with inference(model):
        for number, part in enumerate(pairs.batches(batch_size)):
            seeds = range(number * batch_size, number * batch_size + len(part))
            found.append(_Batch(model, part.to(device), num_loops, list(seeds)).map())
    joined = {
        name: torch.cat([getattr(part, name).cpu() for part in found], dim=-1)
        for name in (*OF_COLUMNS, "correct")
    }
    return ReadingMap(columns=pairs.columns, **joined)


def side_by_side(maps: Sequence[ReadingMap]) -> ReadingMap:
    """The columns of several maps of the same texts and loops in one map."""
    joined = {name: torch.cat([getattr(part, name) for part in maps], -2) for name in OF_COLUMNS}
    columns = tuple(name for part in maps for name in part.columns)
    return ReadingMap(columns=columns, correct=maps[0].correct, **joined)


class _Batch:
    """The runs of one batch of pairs; each text has its own seed of a random initial state."""

    def __init__(
        self, model: RecurrentDepthLM, pairs: Pairs, num_loops: int, seeds: list[int]
    ) -> None:
        self.model, self.pairs, self.num_loops, self.seeds = model, pairs, num_loops, seeds
        self.ctx, self.clean = self._run(pairs.tokens)

    def map(self) -> ReadingMap:
        """The map of this batch."""
        columns = [self._column(number) for number in range(len(self.pairs.columns))]
        corrupted_at, clean_at, always, whole = (
            torch.stack(parts, dim=-2) for parts in zip(*columns, strict=True)
        )
        right = self._logits(self.clean[-1], self.ctx).argmax(dim=-1) == self.pairs.answers
        return ReadingMap(
            columns=self.pairs.columns,
            corrupted_at=corrupted_at,
            clean_at=clean_at,
            always=always,
            whole=whole,
            counted=self.pairs.counted,
            correct=right,
        )

    def _column(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The losses of one column: corrupted at each loop, clean at each, at all, and whole."""
        texts = self.pairs.corrupted[number]
        others = self.pairs.counterfactual_answers[number]
        changed = texts != self.pairs.tokens
        ctx, corrupted = self._run(texts)

        def margin(state: LoopState, ctx: ForwardContext) -> Float[Tensor, "B"]:
            logits = self._logits(state, ctx).double()
            rows = torch.arange(len(logits), device=logits.device)
            return logits[rows, self.pairs.answers] - logits[rows, others]

        def loop(state: LoopState, index: int, corrupt: bool) -> LoopState:
            if corrupt:
                state = put_tokens(state, changed, corrupted[index])
            state = advance(self.model, state, ctx if corrupt else self.ctx)
            return put_tokens(state, changed, self.clean[index + 1])

        def rest(state: LoopState, first: int, corrupt: bool) -> Float[Tensor, "B"]:
            for index in range(first, self.num_loops):
                state = loop(state, index, corrupt)
            return margin(state, self.ctx)

        always = [self.clean[0]]
        for index in range(self.num_loops):
            always.append(loop(always[-1], index, True))
        base = margin(self.clean[-1], self.ctx)
        corrupted_at, clean_at = [], []
        for index in range(self.num_loops):
            corrupted_at.append(base - rest(loop(self.clean[index], index, True), index + 1, False))
            clean_at.append(base - rest(loop(always[index], index, False), index + 1, True))
        return (
            torch.stack(corrupted_at),
            torch.stack(clean_at),
            base - margin(always[-1], self.ctx),
            base - margin(corrupted[-1], ctx),
        )

    def _run(self, tokens: Int[Tensor, "B T"]) -> tuple[ForwardContext, list[LoopState]]:
        """The context of these texts, and their states before the first loop and after each."""
        ctx = self.model.context(tokens, seeds=self.seeds)
        depths = [self.num_loops] * len(tokens)
        start = start_loops(self.model, self.model.encode(tokens, ctx), ctx, depths)
        return ctx, [start, *unroll(self.model, start, ctx)]

    def _logits(self, state: LoopState, ctx: ForwardContext) -> Float[Tensor, "B V"]:
        return self.model.decode(readout(self.model, state), ctx)[:, -1]


def put_tokens(state: LoopState, chosen: Bool[Tensor, "B T"], source: LoopState) -> LoopState:
    """``state`` with all that belongs to the chosen tokens, h, e and the rest, from ``source``."""

    def put(old: Any, new: Any) -> Any:
        if old is None:
            return None
        return torch.where(chosen if old.ndim == 2 else chosen[..., None], new, old)

    def put_recent(old: Any, new: Any) -> Any:
        return None if old is None else torch.where(chosen[:, None, :, None], new, old)

    return replace(
        state,
        h=put(state.h, source.h),
        e=put(state.e, source.e),
        halted=tree_map(put, state.halted, source.halted),
        recent=tree_map(put_recent, state.recent, source.recent),
    )


def _rows(matrix: Float[Tensor, "L K"]) -> list[list[float | None]]:
    return [[defined(value) for value in row] for row in matrix.tolist()]


def _intervals(samples: Float[Tensor, "S L K"]) -> list[list[Sequence[float] | None]]:
    return [[interval(entry) for entry in row.unbind(-1)] for row in samples.unbind(1)]
