"""How the state changes from loop to loop: its norm, its steps, whether tokens become alike."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vector_norm

from openmythos.analysis.observe import Loop, observe, wide
from openmythos.model.context import ForwardContext
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class LoopTrace:
    """Means over tokens; each tuple has one entry per loop.

    D_t = h_t - h_{t-1} is the update of loop t. Where a number is not defined it is None: ``turn``
    and ``acceleration`` at the first loop, and angles where nothing moves. rho(A) < 1 bounds the
    state at fixed weights; whether it converges is read from ``step_ratio``.

    Attributes:
        num_tokens: Number of tokens averaged over.
        initial_norm: |h_0|.
        state_norm: |h_t|, the Euclidean norm of the raw state, before any normalisation.
        step_norm: |D_t|.
        relative_step: |D_t| / |h_t|.
        step_ratio: ``step_norm`` of this loop divided by that of the loop before. Below 1 the steps
            shrink.
        turn: cos(D_t, D_{t-1}): 1 goes straight on, 0 turns by a right angle, -1 goes back.
        radial_fraction: <D_t, h_t / |h_t|>^2 / |D_t|^2, the share of the update along the state,
            which a normalisation before the head hides.
        acceleration: |D_t - D_{t-1}|.
        token_correlation: Cosine similarity of two tokens of a row, each state centred over its
            features, mean over all pairs; 1 means that all tokens are the same.
        rho: The largest entry of the diagonal A; None if the injection has no A.
    """

    num_tokens: int
    initial_norm: float
    state_norm: tuple[float, ...]
    step_norm: tuple[float, ...]
    relative_step: tuple[float, ...]
    step_ratio: tuple[float | None, ...]
    turn: tuple[float | None, ...]
    radial_fraction: tuple[float | None, ...]
    acceleration: tuple[float | None, ...]
    token_correlation: tuple[float, ...]
    rho: float | None

    @property
    def num_loops(self) -> int:
        """Number of loops traced."""
        return len(self.state_norm)

    def to_dict(self) -> dict[str, Any]:
        """The trace, ready for JSON."""
        return asdict(self)


def trace_loops(
    model: RecurrentDepthLM,
    tokens: Int[Tensor, "B T"],
    num_loops: int,
    ctx: ForwardContext | None = None,
    *,
    valid: Bool[Tensor, "B T"] | None = None,
) -> LoopTrace:
    """Run ``num_loops`` loops and record the state after each.

    Args:
        model: Any recurrent-depth model.
        tokens: Token ids.
        num_loops: Loops to run; more than the model was trained with is fine.
        ctx: A context of ``model.context`` without a cache; default: one document per row, with
            ``valid`` as its padding mask.
        valid: True at the tokens to average over; default: all.

    Raises:
        ValueError: ``num_loops`` is below 1, no token is valid, or the context has a cache.

    Source: Huginn (arXiv 2502.05171), section 4.3, for token correlation; Two-Scale Latent Dynamics
    (arXiv 2509.23314) for turn and acceleration.
    """
    if valid is not None and not bool(valid.any()):
        raise ValueError("valid marks no token; mark at least one")
    if ctx is None:
        ctx = model.context(tokens, padding_mask=valid)
    chosen = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    sums = TraceSums()
    with inference(model):
        for loop in observe(model, tokens, num_loops, ctx):
            sums.add(loop, chosen)
    return sums.trace(model)


@dataclass
class TraceSums:
    """Sums over tokens from which a trace follows; batches are added one after the other."""

    num_tokens: int = 0
    _start: "Mean" = field(default_factory=lambda: Mean(1))
    _loops: list["Mean"] = field(default_factory=list)
    _alike: list[tuple[float, int]] = field(default_factory=list)

    def add(self, loop: Loop, valid: Bool[Tensor, "B T"]) -> None:
        """Add a loop of a batch; each batch begins with its first loop."""
        index = loop.number - 1
        if index == 0:
            self.num_tokens += int(valid.sum())
            self._start.add([vector_norm(wide(loop.before), dim=-1)[valid]])
        if index == len(self._loops):
            self._loops.append(Mean(6))
            self._alike.append((0.0, 0))
        self._loops[index].add([values[valid] for values in _measure(loop)])
        total, pairs = _correlations(loop.state.h, valid)
        before = self._alike[index]
        self._alike[index] = (before[0] + total, before[1] + pairs)

    def trace(self, model: RecurrentDepthLM) -> LoopTrace:
        """The trace of all that was added."""
        columns = [*zip(*(mean.values() for mean in self._loops), strict=True)]
        norms, steps, relative = (tuple(map(number, column)) for column in columns[:3])
        turn, radial_fraction, acceleration = columns[3:]
        decay = model.injection.decay()
        return LoopTrace(
            num_tokens=self.num_tokens,
            initial_norm=number(self._start.values()[0]),
            state_norm=norms,
            step_norm=steps,
            relative_step=relative,
            step_ratio=(None, *map(_ratio, steps[1:], steps[:-1])),
            turn=turn,
            radial_fraction=radial_fraction,
            acceleration=acceleration,
            token_correlation=tuple(_share(total, pairs) for total, pairs in self._alike),
            rho=None if decay is None else float(decay.detach().max()),
        )


class Mean:
    """Means of several numbers over tokens, added in parts; a NaN is left out of its mean."""

    def __init__(self, width: int) -> None:
        self.sums, self.counts = [0.0] * width, [0] * width

    def add(self, columns: Sequence[Float[Tensor, " N"]], start: int = 0) -> None:
        """Add tokens; each column holds one of the numbers, the first that of ``start``."""
        stacked = torch.stack(list(columns))
        known = ~stacked.isnan()
        sums, counts = stacked.nansum(dim=1).tolist(), known.sum(dim=1).tolist()
        for index, (total, count) in enumerate(zip(sums, counts, strict=True), start):
            self.sums[index] += total
            self.counts[index] += count

    def values(self) -> list[float | None]:
        """The means; None where there was no number."""
        return [
            total / count if count else None
            for total, count in zip(self.sums, self.counts, strict=True)
        ]


def _measure(loop: Loop) -> list[Float[Tensor, "B T"]]:
    """Norm, step, relative step, turn, radial fraction and acceleration of each token.

    They are NaN where they are not defined.
    """
    h, update = wide(loop.state.h), loop.update
    norm, moved = vector_norm(h, dim=-1), vector_norm(update, dim=-1)
    along = (update * h).sum(dim=-1) / norm.clamp(min=_TINY)
    radial = along.square() / moved.square()
    turn = acceleration = torch.full_like(norm, math.nan)
    if loop.earlier is not None:
        last = loop.earlier.update
        turn = (update * last).sum(dim=-1) / (moved * vector_norm(last, dim=-1))
        acceleration = vector_norm(update - last, dim=-1)
    return [norm, moved, moved / norm.clamp(min=_TINY), turn, radial, acceleration]


def token_correlation(h: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"]) -> float:
    """Mean cosine similarity over all pairs of valid tokens in a row; 0 if there is no pair."""
    return _share(*_correlations(h, valid))


def _correlations(h: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"]) -> tuple[float, int]:
    """The sum of the similarities of all pairs, and their number."""
    wider = wide(h)
    centred = wider - wider.mean(dim=-1, keepdim=True)
    units = centred / vector_norm(centred, dim=-1, keepdim=True).clamp(min=_TINY)
    units = units.masked_fill(~valid[..., None], 0.0)
    # The sum over ordered pairs is |sum of unit vectors|^2 minus each token's product with itself.
    with_itself = units.square().sum(dim=(1, 2))
    sums = units.sum(dim=1).square().sum(dim=-1) - with_itself
    counts = valid.sum(dim=1)
    return float(sums.sum()), int((counts * (counts - 1)).sum())


def _share(total: float, count: int) -> float:
    return total / count if count else 0.0


def number(value: float | None) -> float:
    """A mean of numbers that are always defined: without one, the states were not finite."""
    return math.nan if value is None else value


def _ratio(now: float, before: float) -> float | None:
    return now / before if before > 0 else None
