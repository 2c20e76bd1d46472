import numpy as np

from experiments.what_loops_read.filmstrip import filmstrip


def test_a_row_is_added_by_each_picture() -> None:
    rows = [[1.0, 0.9, 0.0, None], [0.0, 0.1, 1.2, 0.5], [0.0, -0.2, 0.0, 0.4]]
    columns = ("start", "relation 1", "relation 2", "relation 3")
    figure = filmstrip({"looped": rows, "stack": rows[:2]}, columns)
    assert len(figure.axes) == 3 + 2
    for loop, axes in enumerate(figure.axes[:3]):
        (image,) = axes.images
        shown = np.ma.filled(image.get_array(), np.nan)
        assert axes.get_title() == "" and axes.get_title(loc="left") == f"loop {loop + 1}"
        assert np.isnan(shown[loop + 1 :]).all()
        expected = np.clip([[np.nan if x is None else x for x in row] for row in rows], 0, 1)
        np.testing.assert_array_equal(shown[: loop + 1], expected[: loop + 1])
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["start to relation 3"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "2", "3"]


def test_a_strip_of_many_loops_goes_on_below() -> None:
    figure = filmstrip({"looped": [[0.5, 0.5]] * 8}, ("start", "relation 1"))
    places = [axes.get_position() for axes in figure.axes]
    assert places[6].x0 == places[0].x0 and places[6].y1 < places[0].y0
    assert all(place.x1 <= 1 and place.y0 >= 0 for place in places)
