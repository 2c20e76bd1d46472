import json
import math
import statistics

import pytest

from openmythos.eval.score import Measured, Score, ScoreCurve, differences, summarise, sweep


def test_the_mean_of_plain_questions() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    score = summarise([(value, 1.0) for value in values])
    assert score.value == pytest.approx(0.6) and score.num_questions == 5
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert summarise([(1.0, 1.0)]).stderr is None


def test_the_ratio_of_bits_and_bytes() -> None:
    score = summarise([(20.0, 10.0), (90.0, 30.0)])
    assert score.value == pytest.approx(110 / 40)
    residuals = (20 - 2.75 * 10) ** 2 + (90 - 2.75 * 30) ** 2
    assert score.stderr == pytest.approx(math.sqrt(residuals * 2) / 40)
    exact = summarise([(2.5 * size, size) for size in (10.0, 20.0, 70.0)])
    assert exact.value == pytest.approx(2.5) and exact.stderr == pytest.approx(0, abs=1e-12)


def test_differences_know_that_the_questions_are_the_same() -> None:
    shallow = [(float(n % 2), 1.0) for n in range(100)]
    deep = [(1.0, 1.0), *shallow[1:]]  # one more is right
    gain = summarise(differences(deep, shallow))
    assert gain.value == pytest.approx(0.01)
    apart = summarise(deep).stderr
    assert gain.stderr is not None and apart is not None and gain.stderr < apart / 4


def test_score_curves_are_strict_json() -> None:
    scores = {1: Score(0.5, 0.1, 20), 4: Score(math.inf, None, 20)}
    curve = ScoreCurve(task="t", metric="acc", higher_is_better=True, scores=scores)
    row = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert row["scores"] == [
        {"num_loops": 1, "value": 0.5, "stderr": 0.1, "num_questions": 20},
        {"num_loops": 4, "value": None, "stderr": None, "num_questions": 20},
    ]
    assert row["gain"] is None and row["baselines"] == {}
    for bad in ({}, {4: scores[4], 1: scores[1]}):
        with pytest.raises(ValueError, match="give some, rising"):
            ScoreCurve(task="t", metric="acc", higher_is_better=True, scores=bad)


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
