from pathlib import Path

import pytest

from openmythos.analysis.picture import to_svg
from openmythos.eval.picture import plot_score_curves, score_curves
from openmythos.eval.score import Score, ScoreCurve


def curve(task: str, **changes: object) -> ScoreCurve:
    scores = {n: Score(0.2 + 0.1 * i, 0.02, 100) for i, n in enumerate((1, 2, 4, 8))}
    fields = {"metric": "exact_match", "higher_is_better": True, "scores": scores}
    return ScoreCurve(task=task, **{**fields, **changes})


def test_the_picture_is_a_png_file(tmp_path: Path) -> None:
    plot_score_curves([curve(f"task {n}") for n in range(4)], tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_says_what_it_shows() -> None:
    low = curve("bits", metric="bits_per_byte", higher_is_better=False)
    drawn = to_svg(score_curves([curve("words", baselines={"chance": 0.1, "overlap": 0.4}), low]))
    for said in ("words", "exact match", "overlap 0.40", "bits per byte, lower is better", "loops"):
        assert f">{said}<" in drawn
    assert "chance" not in drawn  # only the strongest guesser


def test_one_point_without_an_error_can_be_drawn() -> None:
    assert "<svg" in to_svg(score_curves([curve("one", scores={3: Score(0.5, None, 1)})]))
    with pytest.raises(ValueError, match="no curve"):
        score_curves([])
