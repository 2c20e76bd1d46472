import importlib.util

import pytest

from openmythos.eval.depth_sweep import Measured, require_harness, sweep, sweep_tasks
from openmythos.eval.score import Score
from openmythos.eval.task import EvalTask, measure, summarise
from tests.eval.examples import scorer

TEXTS = [{"text": f"text number {n}, of {n * n} things"} for n in range(5)]


def test_every_depth_is_measured_once_and_rises() -> None:
    asked = []

    def measure_at(loops: int) -> dict[tuple[str, str], Measured]:
        asked.append(loops)
        return {("t", "acc"): Measured(score=Score(loops / 10, 0.1, 5), baselines={"chance": 0.2})}

    (curve,) = sweep((4, 1, 4), measure_at)
    assert asked == [1, 4]
    assert {n: score.value for n, score in curve.scores.items()} == {1: 0.1, 4: 0.4}
    assert curve.gain is not None and curve.gain.value == pytest.approx(0.3)
    assert curve.gain.stderr is None and curve.baselines == {"chance": 0.2}
    assert sweep([2], measure_at)[0].gain is None


def test_tasks_at_every_depth_with_the_error_of_the_gain() -> None:
    task = EvalTask(name="t", kind="text", documents=TEXTS, baselines={})
    asked, done = scorer(), []
    (curve,) = sweep_tasks(
        asked, (1, 3), [task], limit=4, report=lambda n, results: done.append((n, list(results)))
    )
    assert done == [(1, [("t", "bits_per_byte")]), (3, [("t", "bits_per_byte")])]
    for loops, score in curve.scores.items():
        assert score == summarise(measure(scorer(num_loops=loops), task, 4))
    assert curve.gain is not None and curve.gain.stderr is not None
    assert curve.gain.value == pytest.approx(curve.scores[3].value - curve.scores[1].value)
    assert not curve.higher_is_better


def test_a_missing_harness_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_harness()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "openmythos\[eval\]"') as caught:
        require_harness()
    assert "\n" not in str(caught.value)
