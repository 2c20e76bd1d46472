import json
import math

import pytest

from openmythos.eval.score import Score, ScoreCurve


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
