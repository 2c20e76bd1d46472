"""Scores by number of loops: the same questions at every depth, one curve a task and metric."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from openmythos.eval.score import Score, ScoreCurve
from openmythos.eval.scoring import Scorer
from openmythos.eval.task import (
    LOWER_IS_BETTER,
    EvalTask,
    Outcomes,
    differences,
    measure,
    summarise,
)

if TYPE_CHECKING:
    from openmythos.eval.harness import HarnessTasks


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A score at one depth; ``outcomes`` are None where only the total is known."""

    score: Score
    outcomes: Outcomes | None = None
    higher_is_better: bool = True
    baselines: Mapping[str, float] = field(default_factory=dict)


Results = Mapping[tuple[str, str], Measured]  # by task and metric


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


def measure_tasks(
    scorer: Scorer, tasks: Sequence[EvalTask], limit: int | None = None
) -> dict[tuple[str, str], Measured]:
    """The tasks that ship, at the scorer's depth."""
    results = {}
    for task in tasks:
        outcomes = measure(scorer, task, limit)
        results[task.name, task.metric] = Measured(
            score=summarise(outcomes),
            outcomes=outcomes,
            higher_is_better=task.metric not in LOWER_IS_BETTER,
            baselines=task.baselines,
        )
    return results


def sweep_tasks(
    scorer: Scorer,
    num_loops: Iterable[int],
    tasks: Sequence[EvalTask],
    others: "HarnessTasks | None" = None,
    *,
    limit: int | None = None,
    report: Callable[[int, Results], None] | None = None,
) -> list[ScoreCurve]:
    """Curves of tasks that ship, and of others that the harness has loaded.

    Args:
        scorer: Its depth is set to each of ``num_loops`` in turn.
        num_loops: Depths.
        tasks: Of ``task.shipped_task``.
        others: Of ``harness.load_tasks``.
        limit: Only the first questions of each task.
        report: Called with every depth that is done.
    """

    def measure_at(loops: int) -> Results:
        scorer.num_loops = loops
        results = measure_tasks(scorer, tasks, limit)
        if others is not None:
            results |= others.measure(scorer, limit)
        if report is not None:
            report(loops, results)
        return results

    return sweep(num_loops, measure_at)


def require_harness() -> None:
    """Fail with advice where lm-evaluation-harness is not installed.

    Raises:
        ValueError: It is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "only the tasks that ship run without lm-evaluation-harness; run: "
            'pip install "openmythos[eval]"'
        )
