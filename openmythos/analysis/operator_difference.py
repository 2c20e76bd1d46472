"""How much the map of one loop differs from that of another, on the same states."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vector_norm

from openmythos.analysis.intervention import at_loop, batches
from openmythos.model.inference import inference
from openmythos.model.loop import advance, start_loops
from openmythos.model.recurrent import RecurrentDepthLM

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class OperatorDifference:
    """The part of a loop that its number changes: embeddings, LoRA, scales, router biases.

    Attributes:
        relative: ``relative[t][u]`` is |f(h_t, u) - f(h_t, t)| / |f(h_t, t) - h_t|, where h_t is
            the state that loop t gets, and f(., u) is loop u: means over tokens of the numerator
            and of the denominator. It is exactly 0 if no loop signal tells the loops apart.
    """

    relative: tuple[tuple[float, ...], ...]

    @property
    def neighbours(self) -> tuple[float, ...]:
        """By how much each loop's step changes if the next loop runs in its place."""
        return tuple(row[loop + 1] for loop, row in enumerate(self.relative[:-1]))

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {"relative": [list(row) for row in self.relative], "neighbours": self.neighbours}


def operator_difference(
    model: RecurrentDepthLM,
    tokens: Int[Tensor, "N T"],
    num_loops: int,
    *,
    batch_size: int = 256,
) -> OperatorDifference:
    """Run every loop's map on the states that each loop gets.

    With depth attention the keys of the last loops belong to the state; a loop's number says how
    many of them there are, so it is a loop signal too.

    Raises:
        ValueError: ``num_loops`` or ``batch_size`` is below 1.
    """
    if num_loops < 1:
        raise ValueError(f"num_loops is {num_loops}; it must be at least 1")
    apart = torch.zeros(num_loops, num_loops, dtype=torch.float64)
    moved = torch.zeros(num_loops, 1, dtype=torch.float64)
    with inference(model):
        for part, seeds in batches(model, tokens, batch_size):
            ctx = model.context(part, seeds=seeds)
            state = start_loops(model, model.encode(part, ctx), ctx, [num_loops] * len(part))
            for loop in range(num_loops):
                after = advance(model, state, ctx)
                moved[loop] += _total(after.h, state.h)
                for other in range(num_loops):
                    if other != loop:
                        instead = advance(model, at_loop(state, other), ctx)
                        apart[loop, other] += _total(instead.h, after.h)
                state = after
    relative = (apart / moved.clamp(min=_TINY)).tolist()
    return OperatorDifference(relative=tuple(map(tuple, relative)))


def _total(a: Float[Tensor, "B T D"], b: Float[Tensor, "B T D"]) -> float:
    """The sum of the distances of all tokens."""
    return float(vector_norm(a.double() - b.double(), dim=-1).sum())
