from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from openmythos.analysis import picture as style
from openmythos.demo import picture
from openmythos.demo.result import HopsResult, TextResult
from tests.demo.examples import halted_result, hops_result, loop_trace, text_result

PNG = b"\x89PNG\r\n\x1a\n"


def words(svg: str) -> str:
    """The picture's texts."""
    return " | ".join(part.split("</text>")[0].split(">")[-1] for part in svg.split("<text")[1:])


def test_pictures_are_png_files(tmp_path: Path) -> None:
    picture.plot_depth_curve(text_result(), tmp_path / "depth.png")
    picture.plot_hops_grid(hops_result(), tmp_path / "hops.png", halted_result())
    for name in ("depth.png", "hops.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(PNG)
        assert len(data) > 10_000


def test_depth_curve_prints_its_values() -> None:
    said = words(style.to_svg(picture.depth_curve(text_result())))
    for word in ("2.500", "1.990", "xz -9", "depths drawn, 1 to 9", "training: 4"):
        assert word in said


def test_hops_grid_parts_trained_from_never_trained() -> None:
    said = words(style.to_svg(picture.hops_grid(hops_result())))
    for word in (
        ".85",
        "never",
        "trained",
        "exit rule",
        "4.1",
        "chance 0.06",
        "2 to 8 in training",
    ):
        assert word in said
    seen = words(style.to_svg(picture.hops_grid(hops_result(max_train_hops=8))))
    assert "never" not in seen
    both = words(style.to_svg(picture.hops_grid(hops_result(), halted_result())))
    assert "The original's halting" in both
    assert "ACT" in both


def test_column_heads_of_the_grid_do_not_touch() -> None:
    figure = picture.hops_grid(hops_result(), halted_result())
    renderer = FigureCanvasAgg(figure).get_renderer()
    with style.styled():
        for axes in figure.axes:
            texts = {text.get_text(): text for text in axes.texts}
            boxes = [texts[name].get_window_extent(renderer) for name in ("loops", "accuracy")]
            gap = boxes[1].x0 - boxes[0].x1
            assert gap > 0.12 * figure.dpi, "less than a letter apart"
            assert boxes[1].x1 < figure.bbox.x1 - 1


def test_other_pictures_say_what_they_show() -> None:
    assert "held out 2.00" in words(style.to_svg(picture.training_curve(text_result())))
    assert "4 hops" in words(style.to_svg(picture.stage_curve(hops_result())))
    both = words(style.to_svg(picture.stage_curve(hops_result(), halted_result())))
    assert "The original's halting" in both
    assert "rho(A) 0.45, A alone" in words(style.to_svg(style.trace_curves(loop_trace())))
    assert "rho" not in words(style.to_svg(style.trace_curves(loop_trace(rho=None))))


@pytest.mark.parametrize(
    "result",
    [
        text_result(train_curve=[], held_out_curve=[], marks={}),
        text_result(train_curve=[(1.0, float("nan"))], held_out_curve=[(1.0, 2.0)]),
        text_result(train_curve=[(1.0, 3.0)], validation={4: 2.0}),
    ],
)
def test_short_runs_can_be_drawn(result: TextResult) -> None:
    assert "<svg" in style.to_svg(picture.training_curve(result))
    assert "<svg" in style.to_svg(picture.depth_curve(result))


@pytest.mark.parametrize(
    "result",
    [
        hops_result(max_train_hops=8),
        hops_result(max_train_hops=2, trained_loops=(4, 4), stage_curve=[]),
        hops_result(
            hops=[3],
            loops=[2],
            accuracy=[[0.5]],
            exit_loops=[2.0],
            exit_accuracy=[0.5],
            max_train_hops=1,
            trace=loop_trace(1),
        ),
    ],
)
def test_small_tables_can_be_drawn(result: HopsResult) -> None:
    assert "<svg" in style.to_svg(picture.hops_grid(result))
    assert "<svg" in style.to_svg(picture.stage_curve(result))
    assert "<svg" in style.to_svg(style.trace_curves(result.trace))


def test_pictures_are_the_same_every_time() -> None:
    first, second = (style.to_svg(picture.hops_grid(hops_result())) for _ in range(2))
    assert first == second
