import re
import sys

import pytest

from openmythos.analysis import picture as style
from openmythos.analysis.picture import (
    curves_by_loop,
    heat_map,
    label_place,
    roomiest_end,
    to_svg,
    two_digits,
)

FALLING = {1: 3.0, 2: 2.0, 4: 2.0, 8: 2.5}


def test_missing_matplotlib_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "openmythos\[plot\]"') as caught:
        style.require_matplotlib()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loops", "place"), [(1, (0, 1)), (2, (1, 1)), (4, (-1, 1)), (8, (0, 1))], ids=str
)
def test_labels_stand_where_the_line_is_not(loops: int, place: tuple[int, int]) -> None:
    assert label_place(FALLING, loops, flat=0.1) == place


def test_labels_leave_valleys() -> None:
    assert label_place({1: 3.0, 2: 2.0, 4: 3.0}, 2, flat=0.1) == (0, -1)


@pytest.mark.parametrize(
    ("values", "end"),
    [
        ([], ("left", 1)),
        ([0.6] * 4, ("left", 1)),
        ([1.0] * 4, ("left", -1)),
        ([0.9, 0.9, 0.2, 0.2], ("right", 1)),
        ([0.7, 0.9, 1.2, 1.2], ("right", -1)),
    ],
)
def test_names_of_lines_take_the_roomiest_end(values: list[float], end: tuple[str, int]) -> None:
    assert roomiest_end(values, height=0.8, lift=0.1) == end


def words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.07, ".07"), (-0.12, "-.12"), (0.999, "1.0"), (-0.001, ".00"), (12.3, "12"), (0.0, ".00")],
)
def test_numbers_in_cells_are_short(value: float, said: str) -> None:
    assert two_digits(value) == said


def test_cells_hold_their_numbers_and_dots() -> None:
    labels = {"title": "title", "row_label": "loop", "column_label": "token"}
    svg = to_svg(heat_map([[0.5, None], [-0.2, 2.0]], ["1", "2"], ["a", "b"], **labels))
    assert {"title", "loop", "token", "a", "b", ".50", "-.20", "2.0", "·"} <= {*words(svg)}
    many = [str(number) for number in range(20)]
    found = words(to_svg(heat_map([[0.5] * 20] * 20, many, many, **labels)))
    assert ".50" not in found and "16" in found and "17" not in found


def test_lines_are_named_and_marked_once() -> None:
    curves = {"one": [3.0, None, 1.0], "two": [2.0, 1.0, 1.0], "none": [None, None, None]}
    svg = to_svg(curves_by_loop(curves, title="title", marks={"T*": 2}, quiet=["two"]))
    found = words(svg)
    assert found.count("one") == found.count("two") == found.count("T*") == 1
    assert "none" not in found
    ranks = words(to_svg(curves_by_loop({"a": [900.0, 1.0]}, title="t", marks={}, ranks=True)))
    assert {"1", "10", "100"} <= {*ranks}
