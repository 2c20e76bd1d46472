"""Scores by number of loops: the same questions at each depth, one curve per task and metric."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from openmythos.config.schema import json_ready

Outcomes = list[tuple[float, float]]  # per question: an amount and its weight


@dataclass(frozen=True)
class Score:
    """A weighted mean over questions; ``stderr`` is None where it is not known."""

    value: float
    stderr: float | None
    num_questions: int


def summarise(outcomes: Outcomes) -> Score:
    """The weighted mean, sum of amounts / sum of weights, and its standard error.

    With weights of 1 the error is the sample's standard deviation over sqrt(n). Otherwise (bits per
    byte) it is that of a ratio estimator.

    Source: Cochran, Sampling Techniques (3rd edition, 1977), equation 6.13, without the correction
    for a finite population.
    """
    count, weight = len(outcomes), sum(part for _, part in outcomes)
    value = sum(amount for amount, _ in outcomes) / weight
    if count < 2:
        return Score(value, None, count)
    squares = sum((amount - value * part) ** 2 for amount, part in outcomes)
    return Score(value, math.sqrt(squares * count / (count - 1)) / weight, count)


def differences(deep: Outcomes, shallow: Outcomes) -> Outcomes:
    """Paired differences, one per question; both sides must have the same weights."""
    return [(a - b, weight) for (a, weight), (b, _) in zip(deep, shallow, strict=True)]


def with_error(score: Score, digits: int = 3, sign: str = "") -> str:
    """A score and its standard error in words: 0.974 ± 0.007."""
    error = "" if score.stderr is None else f" ± {score.stderr:.{digits}f}"
    return f"{score.value:{sign}.{digits}f}{error}"


def is_clear(difference: Score) -> bool:
    """Whether a difference is larger than two of its standard errors."""
    return difference.stderr is not None and abs(difference.value) > 2 * difference.stderr


# --- by number of loops ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A score at one depth; ``outcomes`` is None where only the total is known."""

    score: Score
    outcomes: Outcomes | None = None
    higher_is_better: bool = True
    baselines: Mapping[str, float] = field(default_factory=dict)


WORDS = {"acc": "accuracy", "acc_norm": "accuracy, by length"}


def in_words(metric: str) -> str:
    """A metric's name as a person reads it."""
    return WORDS.get(metric, metric.replace("_", " "))


Results = Mapping[tuple[str, str], Measured]  # by task and metric


@dataclass(frozen=True, kw_only=True)
class ScoreCurve:
    """One metric of one task by number of loops.

    Attributes:
        scores: By number of loops, in rising order.
        baselines: Scores of guessers that use no model, by name.
        differences: By number of loops: the score minus that at the fewest loops. Its standard
            error is that of the paired differences per question, far smaller than the scores' own.
    """

    task: str
    metric: str
    higher_is_better: bool
    scores: Mapping[int, Score]
    baselines: Mapping[str, float] = field(default_factory=dict)
    differences: Mapping[int, Score] = field(default_factory=dict)

    @property
    def gain(self) -> Score | None:
        """The score at the most loops minus that at the fewest; None if there is one depth only."""
        return self.differences.get(max(self.scores))

    def __post_init__(self) -> None:
        """Check that there are scores, in rising order of loops."""
        if not self.scores or list(self.scores) != sorted(self.scores):
            raise ValueError(f"scores are at {list(self.scores)} loops; give some, rising")

    def to_dict(self) -> dict[str, Any]:
        """The curve, ready for strict JSON."""
        record = asdict(self) | {"gain": self.gain and asdict(self.gain)}
        for name in ("scores", "differences"):
            points = getattr(self, name).items()
            record[name] = [{"num_loops": loops, **asdict(score)} for loops, score in points]
        return json_ready(record)


def sweep(num_loops: Iterable[int], measure_at: Callable[[int], Results]) -> list[ScoreCurve]:
    """Call ``measure_at`` for each number of loops and gather its results into curves."""
    depths = sorted(set(num_loops))
    found = {loops: measure_at(loops) for loops in depths}
    curves = []
    for task, metric in found[depths[0]]:
        points = {loops: found[loops][task, metric] for loops in depths}
        first = points[depths[0]]
        curves.append(
            ScoreCurve(
                task=task,
                metric=metric,
                higher_is_better=first.higher_is_better,
                scores={loops: point.score for loops, point in points.items()},
                baselines=dict(first.baselines),
                differences={n: _difference(points[n], first) for n in depths[1:]},
            )
        )
    return curves


def _difference(deep: Measured, shallow: Measured) -> Score:
    if shallow.outcomes is not None and deep.outcomes is not None:
        return summarise(differences(deep.outcomes, shallow.outcomes))
    value = deep.score.value - shallow.score.value
    return Score(value, None, deep.score.num_questions)
