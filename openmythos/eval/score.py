"""Scores by number of loops, as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from openmythos.config.schema import json_ready


@dataclass(frozen=True)
class Score:
    """A mean over questions and its standard error, where that is known."""

    value: float
    stderr: float | None
    num_questions: int


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
