from itertools import pairwise

import numpy as np

from openmythos.analysis.picture import to_svg
from openmythos.config.presets import preset
from openmythos.plan.scaling_law import PARCAE, fit, simulate
from openmythos.report import picture


def test_smoothing_keeps_short_curves_and_means() -> None:
    assert picture.smoothed([1.0, 5.0]) == [1.0, 5.0]
    long = [float(i % 2) for i in range(800)]
    assert max(abs(value - 0.5) for value in picture.smoothed(long)[20:-20]) < 0.05


def test_names_at_the_ends_of_lines_do_not_hide_each_other() -> None:
    curves = {n: [(0.0, 3.0), (10.0, 2.0 + n * 1e-4)] for n in (1, 2, 4, 8)}
    figure = picture.held_out_curves(curves, "title")
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    places = sorted((text.xy[1], text.get_text()) for text in axes.texts)
    assert [name for _, name in places] == ["1 loop", "2 loops", "4 loops", "8 loops"]
    gaps = [b - a for (a, _), (b, _) in pairwise(places)]
    assert min(gaps) > 0.07 * (high - low)


def test_the_first_steps_do_not_flatten_the_curve() -> None:
    curve = [(float(i), 100.0 if i == 0 else 1.0 - i / 1000) for i in range(100)]
    (axes,) = picture.loss_curve(curve, "title").axes
    assert axes.get_ylim()[1] < 2
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_panels_leave_no_empty_axes() -> None:
    charts = {name: {"": [(1.0, 2.0), (2.0, 3.0)]} for name in "abc"}
    text = to_svg(picture.panels(charts))
    assert all(f">{name}</text>" in text for name in "abc")
    figure = picture.panels(charts)
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]


def test_one_point_is_drawn() -> None:
    (axes,) = picture.loss_curve([(1.0, 2.0)], "title").axes
    assert any(line.get_marker() == "o" for line in axes.lines)
    assert to_svg(picture.depth_curve({1: 2.0}, None, "title"))


def test_laws_are_drawn_over_the_losses_that_they_see() -> None:
    runs = simulate(PARCAE["parcae-370m"], preset("parcae-370m"), noise=0.002)
    found = fit("unrolled", runs)
    (axes,) = picture.laws({"unrolled": found}, runs).axes
    points = axes.get_lines()[1]
    np.testing.assert_allclose(points.get_xdata(), found.predict(runs))
    np.testing.assert_allclose(points.get_ydata(), runs["loss"])
    assert axes.get_title(loc="left") == "unrolled"
