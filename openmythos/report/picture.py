"""The pictures of a run: how it learnt, what its depth bought, what its state did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, INK, MUTED, OFF, figure_of, styled
from openmythos.plan.scaling_law import Fit, Runs, used_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]  # points (step, value)

FAINT = 0.3  # opacity of what is not smoothed


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes and fixed margins in inches, so that all pictures align."""
    figure = figure_of(width, height)
    left, right, top, bottom = 0.45, 0.12, 0.36, 0.46
    inner = (1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure, figure.add_axes((left / width, bottom / height, *inner))


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred moving average over about 1/40 of the curve."""
    reach = len(values) // 80
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def loss_curve(curve: Curve, title: str) -> Figure:
    """A number over training steps, raw and smoothed; its beginning may be cut off above."""
    with styled():
        figure, axes = canvas(5.8, 3.1)
        _draw(axes, curve)
        _below_start(axes, [curve])
        axes.set_xlabel("training steps")
        axes.set_title(title)
    return figure


def laws(fits: Mapping[str, Fit], runs: Runs) -> Figure:
    """Losses of runs over those that fitted laws give them, a panel per law."""
    with styled():
        figure = figure_of(3.1 * len(fits), 3.1)
        for place, (name, found) in enumerate(fits.items(), start=1):
            axes = figure.add_subplot(1, len(fits), place)
            used = used_by(name, runs)
            given, seen = found.predict(used), used["loss"]
            ends = [min(*given, *seen), max(*given, *seen)]
            axes.plot(ends, ends, color=MUTED, linewidth=1.0)
            axes.plot(given, seen, "o", color=BLUE, markersize=4.0, alpha=0.7)
            axes.set_title(name)
            axes.set_xlabel("loss of the law")
            axes.set_ylabel("loss of the run")
        figure.tight_layout()
    return figure


def held_out_curves(curves: Mapping[int, Curve], title: str) -> Figure:
    """A held-out number over training steps, one line per number of loops."""
    with styled():
        figure, axes = canvas(5.8, 3.3)
        for place, loops in enumerate(sorted(curves)):
            curve = curves[loops]
            strength = (place + 1) / len(curves)
            steps, values = zip(*curve, strict=True)
            style: dict[str, Any] = {"color": BLUE, "alpha": 0.25 + 0.75 * strength, "zorder": 3}
            axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.6, **style)
        _below_start(axes, list(curves.values()))
        names = {loops: f"{loops} loop{'' if loops == 1 else 's'}" for loops in curves}
        _label_ends(axes, {names[loops]: curve[-1] for loops, curve in curves.items()}, 0.075)
        axes.set_xlabel("training steps")
        axes.set_title(title)
    return figure


def depth_curve(values: Mapping[int, float], mean_loops: float | None, title: str) -> Figure:
    """A held-out number over loops, with the mean depth of training marked."""
    with styled():
        figure, axes = canvas(5.8, 3.1)
        loops = sorted(values)
        axes.set_xscale("log", base=2)
        axes.plot(loops, [values[n] for n in loops], color=BLUE, marker="o", markersize=5, zorder=3)
        for n in loops:
            label = f"{values[n]:.3f}"
            axes.annotate(label, (n, values[n]), (0, 7), color=BLUE, ha="center", **OFF)
        low, high = min(values.values()), max(values.values())
        span = max(high - low, 0.05)  # a narrower axis would make noise look like an effect
        axes.set_ylim(low - 0.15 * span, high + 0.35 * span)
        axes.set_xlim(loops[0] / 1.3, loops[-1] * 1.3)
        if mean_loops:
            axes.axvline(mean_loops, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            place = (mean_loops, axes.get_ylim()[1])
            said = f"mean depth in training: {mean_loops:.3g}"
            side, shift = (
                ("right", -4) if mean_loops > math.sqrt(loops[0] * loops[-1]) else ("left", 4)
            )
            axes.annotate(
                said, place, (shift, -2), color=MUTED, fontsize=8.5, va="top", ha=side, **OFF
            )
        axes.set_xticks(loops, [str(n) for n in loops])
        axes.minorticks_off()
        axes.set_xlabel("loops (same weights, run this many times)")
        axes.set_title(title)
    return figure


def panels(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Small charts over training steps, two in a row; curves that share one are named.

    Args:
        curves: The curves of each chart by their names, by its title.
    """
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(curves) // 2)
    height = 0.35 + 1.75 * rows
    with styled():
        figure = figure_of(5.8, height)
        grid = figure.subplots(rows, 2, squeeze=False)
        figure.subplots_adjust(
            0.09, 0.46 / height, 0.97, 1 - 0.3 / height, wspace=0.28, hspace=0.55
        )
        for axes, (title, parts) in zip(grid.flat, curves.items(), strict=False):
            for place, curve in enumerate(parts.values()):
                _draw(axes, curve, 0.35 + 0.65 * (place + 1) / len(parts), thin=True)
            axes.set_title(title, fontsize=9.5)
            known = [value for curve in parts.values() for _, value in curve]
            high = max([value for value in known if math.isfinite(value)], default=1.0)
            axes.set_ylim(0, 1.12 * high if high > 0 else 1.0)
            axes.set_xlim(left=0)
            if len(parts) > 1:
                _label_ends(axes, {name: curve[-1] for name, curve in parts.items()}, 0.13)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        for axes in grid.flat[len(curves) :]:
            axes.axis("off")
        for axes in grid[-1]:
            axes.set_xlabel("training steps")
        if len(curves) % 2:
            grid[-1][-1].set_xlabel("")
    return figure


def _draw(axes: Axes, curve: Curve, alpha: float = 1.0, thin: bool = False) -> None:
    """A curve, and behind it the numbers that it smooths."""
    known = [(step, value) for step, value in curve if math.isfinite(value)]
    steps, values = [step for step, _ in known], [value for _, value in known]
    width = 1.4 if thin else 2.0
    axes.plot(steps, values, color=BLUE, linewidth=0.7, alpha=FAINT * alpha)
    axes.plot(steps, smoothed(values), color=BLUE, linewidth=width, alpha=alpha)
    if len(known) == 1:  # a line needs two points
        axes.plot(steps, values, "o", color=BLUE, markersize=4, alpha=alpha)


def _below_start(axes: Axes, curves: Sequence[Curve]) -> None:
    """Axes over whole steps, without the first part of the fall, which would flatten the rest."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    shown = [v for curve in curves for _, v in curve[len(curve) // 20 :] if math.isfinite(v)]
    if shown:
        low, high = min(shown), max(shown)
        span = max(high - low, 0.05)
        axes.set_ylim(low - 0.1 * span, high + 0.1 * span)
    axes.set_xlim(left=0)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], least: float) -> None:
    """Name each line at its right end, at least this share of the height from the next name."""
    low, high = axes.get_ylim()
    gap = least * (high - low)
    right = max(step for step, _ in ends.values())
    axes.set_xlim(right=1.17 * right if right else 1.0)
    height = -math.inf
    for name, (step, value) in sorted(ends.items(), key=lambda item: item[1][1]):
        if math.isfinite(value):
            height = max(value, height + gap)
            axes.annotate(name, (step, height), (7, 0), color=INK, fontsize=8.5, va="center", **OFF)
