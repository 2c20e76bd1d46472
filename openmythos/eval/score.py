"""Scores by number of loops: the same questions at every depth, one curve per task and metric."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from openmythos.config.schema import json_ready

Outcomes = list[tuple[float, float]]  # of every question: what counts, and its weight


@dataclass(frozen=True)
class Score:
    """A mean over questions and its standard error, where that is known."""

    value: float
    stderr: float | None
    num_questions: int


def summarise(outcomes: Outcomes) -> Score:
    """The weighted mean and its standard error.

    With weights of 1 that is the sample's deviation over sqrt(n). Otherwise (bits over bytes) it is
    the error of a ratio of two sums.

    Source: Cochran, Sampling Techniques (3rd edition, 1977), equation 6.13, no correction for a
    finite population.
    """
    count, weight = len(outcomes), sum(part for _, part in outcomes)
    value = sum(amount for amount, _ in outcomes) / weight
    if count < 2:
        return Score(value, None, count)
    squares = sum((amount - value * part) ** 2 for amount, part in outcomes)
    return Score(value, math.sqrt(squares * count / (count - 1)) / weight, count)


def differences(deep: Outcomes, shallow: Outcomes) -> Outcomes:
    """Question by question; both have the same weights."""
    return [(a - b, weight) for (a, weight), (b, _) in zip(deep, shallow, strict=True)]


# --- by number of loops ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A score at one depth; ``outcomes`` are None where only the total is known."""

    score: Score
    outcomes: Outcomes | None = None
    higher_is_better: bool = True
    baselines: Mapping[str, float] = field(default_factory=dict)


Results = Mapping[tuple[str, str], Measured]  # by task and metric


@dataclass(frozen=True, kw_only=True)
class ScoreCurve:
    """One metric of one task by number of loops.

    Attributes:
        scores: By loops, rising.
        baselines: What guessers reach that use no model, by name.
        gain: The deepest score less the shallowest; its standard error is that of the differences
            question by question, far smaller than the scores' own.
    """

    task: str
    metric: str
    higher_is_better: bool
    scores: Mapping[int, Score]
    baselines: Mapping[str, float] = field(default_factory=dict)
    gain: Score | None = None

    def __post_init__(self) -> None:
        """Refuse a curve without a point."""
        if not self.scores or list(self.scores) != sorted(self.scores):
            raise ValueError(f"scores are at {list(self.scores)} loops; give some, rising")

    def to_dict(self) -> dict[str, Any]:
        """Ready for strict JSON."""
        points = [{"num_loops": loops, **asdict(score)} for loops, score in self.scores.items()]
        return json_ready({**asdict(self), "scores": points})


def sweep(num_loops: Iterable[int], measure_at: Callable[[int], Results]) -> list[ScoreCurve]:
    """The curves of what ``measure_at`` finds at each number of loops."""
    depths = sorted(set(num_loops))
    found = {loops: measure_at(loops) for loops in depths}
    curves = []
    for task, metric in found[depths[0]]:
        points = {loops: found[loops][task, metric] for loops in depths}
        first, last = points[depths[0]], points[depths[-1]]
        curves.append(
            ScoreCurve(
                task=task,
                metric=metric,
                higher_is_better=first.higher_is_better,
                scores={loops: point.score for loops, point in points.items()},
                baselines=dict(first.baselines),
                gain=_gain(first, last) if len(depths) > 1 else None,
            )
        )
    return curves


def _gain(shallow: Measured, deep: Measured) -> Score:
    if shallow.outcomes is not None and deep.outcomes is not None:
        return summarise(differences(deep.outcomes, shallow.outcomes))
    value = deep.score.value - shallow.score.value
    return Score(value, None, deep.score.num_questions)
