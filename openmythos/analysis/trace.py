"""How the state changes from loop to loop: its norm, its steps, whether tokens become alike."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vector_norm

from openmythos.model.context import ForwardContext
from openmythos.model.loop import start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class LoopTrace:
    """Means over tokens; each tuple has one entry per loop.

    rho(A) < 1 is a property of A only: whether the state converges is read from ``step_ratio``.

    Attributes:
        num_tokens: Number of tokens averaged over.
        initial_norm: |h_0|.
        state_norm: |h_t|, the Euclidean norm.
        step_norm: |h_t - h_{t-1}|.
        relative_step: |h_t - h_{t-1}| / |h_t|.
        step_ratio: ``step_norm`` of this loop divided by that of the loop before; None where it is
            not defined. Below 1 the steps shrink.
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
    token_correlation: tuple[float, ...]
    rho: float | None

    @property
    def num_loops(self) -> int:
        """Number of loops traced."""
        return len(self.state_norm)

    def to_dict(self) -> dict[str, Any]:
        """The trace, ready for JSON."""
        return asdict(self)


@torch.no_grad()
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

    Source: Huginn (arXiv 2502.05171), section 4.3, for token correlation.
    """
    if num_loops < 1:
        raise ValueError(f"num_loops is {num_loops}; it must be at least 1")
    if valid is not None and not bool(valid.any()):
        raise ValueError("valid marks no token; mark at least one")
    if ctx is not None and ctx.cache is not None:
        raise ValueError("ctx has a cache, which a trace would write to; make it without one")
    if ctx is None:
        ctx = model.context(tokens, padding_mask=valid)
    chosen = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    e = model.encode(tokens, ctx)
    start = start_loops(model, e, ctx, [num_loops] * len(tokens))
    h = start.h
    initial_norm = _mean(vector_norm(h.float(), dim=-1), chosen)
    records: list[tuple[float, ...]] = []
    for state in unroll(model, start, ctx):
        before, h = h, state.h
        norm = vector_norm(h.float(), dim=-1)
        moved = vector_norm(h.float() - before.float(), dim=-1)
        relative = moved / norm.clamp(min=_TINY)
        means = (_mean(values, chosen) for values in (norm, moved, relative))
        records.append((*means, token_correlation(h, chosen)))
    state_norm, step_norm, relative_step, correlation = zip(*records, strict=True)
    decay = model.injection.decay()
    return LoopTrace(
        num_tokens=int(chosen.sum()),
        initial_norm=initial_norm,
        state_norm=state_norm,
        step_norm=step_norm,
        relative_step=relative_step,
        step_ratio=(None, *map(_ratio, step_norm[1:], step_norm[:-1])),
        token_correlation=correlation,
        rho=None if decay is None else float(decay.max()),
    )


def token_correlation(h: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"]) -> float:
    """Mean cosine similarity over all pairs of valid tokens in a row; 0 if there is no pair."""
    wide = h.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    units = centred / vector_norm(centred, dim=-1, keepdim=True).clamp(min=_TINY)
    units = units.masked_fill(~valid[..., None], 0.0)
    # The sum over ordered pairs is |sum of unit vectors|^2 minus each token's product with itself.
    with_itself = units.square().sum(dim=(1, 2))
    sums = units.sum(dim=1).square().sum(dim=-1) - with_itself
    counts = valid.sum(dim=1)
    num_pairs = int((counts * (counts - 1)).sum())
    return float(sums.sum()) / num_pairs if num_pairs else 0.0


def _mean(values: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> float:
    return float(values[valid].mean())


def _ratio(now: float, before: float) -> float | None:
    return now / before if before > 0 else None
