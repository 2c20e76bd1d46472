from pathlib import Path
from typing import Any

import pytest

from openmythos.analysis.picture import to_svg
from openmythos.eval.calibration import Point, Setting, choose
from openmythos.eval.picture import (
    frontier_picture,
    plot_frontier,
    plot_score_curves,
    score_curves,
)
from openmythos.eval.score import Measured, Score, ScoreCurve, summarise, sweep
from openmythos.model.exit import ArgmaxStableExit, KLExit, LatentDifferenceExit


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


def limits(drawn: Any) -> list[tuple[float, float]]:
    return [axes.get_ylim() for axes in drawn.axes]


def test_panels_of_one_metric_have_the_same_axis() -> None:
    near = {n: Score(0.95 + 0.01 * n, 0.02, 100) for n in (1, 2)}
    bits = curve("bits", metric="bits_per_byte", scores={1: Score(2.0, None, 9)})
    drawn = score_curves(
        [curve("far", metric="acc"), curve("near", metric="acc", scores=near), bits]
    )
    far, close, other = limits(drawn)
    assert far == close and far[0] < 0.18 and far[1] > 0.97
    assert other != far and other[0] < 2.0 < other[1]
    assert ">accuracy<" in to_svg(drawn) and ">acc<" not in to_svg(drawn)


def test_bars_show_the_difference_and_not_the_level() -> None:
    """Half of the questions are right at any depth: the levels' errors are large, that of the
    difference is small."""

    def measure_at(loops: int) -> dict[tuple[str, str], Measured]:
        outcomes = [(float(n < 200 or (loops > 1 and n < 210)), 1.0) for n in range(400)]
        return {("t", "acc"): Measured(score=summarise(outcomes), outcomes=outcomes)}

    (found,) = sweep([1, 4], measure_at)
    assert found.differences[4].value == pytest.approx(10 / 400)
    drawn = score_curves([found])
    (bars,) = [c for c in drawn.axes[0].collections if hasattr(c, "get_segments")]
    lengths = [float(segment[1, 1] - segment[0, 1]) / 2 for segment in bars.get_segments()]
    assert lengths == pytest.approx([0.0, found.differences[4].stderr])
    assert lengths[1] < found.scores[4].stderr / 3
    assert "difference" in to_svg(drawn) and "to 1 loop, question by question" in to_svg(drawn)


def test_one_point_without_an_error_can_be_drawn() -> None:
    assert "<svg" in to_svg(score_curves([curve("one", scores={3: Score(0.5, None, 1)})]))
    with pytest.raises(ValueError, match="no curve"):
        score_curves([])


def test_the_frontier_shows_depths_rules_and_the_choice(tmp_path: Path) -> None:
    rules = [LatentDifferenceExit(), KLExit(), ArgmaxStableExit()]
    settings = [Setting(n) for n in (1, 2, 4)] + [Setting(4, rule) for rule in rules]
    points = [
        Point(setting, [(2.0 - 0.1 * place, 1.0), (2.1, 1.0)], 100, 200, (900.0 / (place + 1),))
        for place, setting in enumerate(settings)
    ]
    found = choose(points, "bits_per_byte", 0.3)
    figure = frontier_picture(found)
    drawn = to_svg(figure)
    shown = ("bits per byte, lower is better", "tokens per second", "fixed depth", "chosen")
    for said in (
        *shown,
        "rule: kl",
        "rule: latent difference",
        "rule: argmax stable",
        "1",
        "2",
        "4",
    ):
        assert f">{said}<" in drawn
    low, high = figure.axes[0].get_ylim()
    assert low < min(point.score.value for point in points) < found.best.score.value + 0.3 < high
    plot_frontier(found, tmp_path / "exit.png")
    assert (tmp_path / "exit.png").read_bytes().startswith(b"\x89PNG")
