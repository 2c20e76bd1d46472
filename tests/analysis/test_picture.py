import sys

import pytest

from openmythos.analysis import picture as style
from openmythos.analysis.picture import label_place, roomiest_end

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
