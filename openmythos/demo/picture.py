"""The demo's pictures.

Blue is what was measured at a given depth, orange the depth that the model chose, grey is context.
Pictures stay readable in greyscale and for colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmythos.analysis.picture import (
    BAND,
    BLUE,
    CELL,
    INK,
    MUTED,
    OFF,
    ORANGE,
    PAPER,
    figure_of,
    label_place,
    save,
    styled,
    two_digits,
)
from openmythos.demo.result import HopsResult, TextResult
from openmythos.report.picture import canvas, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_depth_curve(result: TextResult, path: Path) -> None:
    """Held-out bits per byte over loops."""
    save(depth_curve(result), path)


def plot_hops_grid(result: HopsResult, path: Path, original: HopsResult | None = None) -> None:
    """Accuracy over hops x loops, and beside it the same model with the original's halting."""
    save(hops_grid(result, original), path)


# --- act 1 ---------------------------------------------------------------------------------------


def depth_curve(result: TextResult) -> Figure:
    """Held-out bits per byte over loops, with the trained depths marked."""
    with styled():
        figure, axes = canvas(5.8, 3.7)
        curve = {n: score.value for n, score in result.validation.items()}
        ticks, depth = sorted(curve), result.trained_depth
        marks = sorted(result.marks.items(), key=lambda item: abs(item[1] - curve[depth]))[:1]
        values = [*dict(marks).values(), *curve.values()]
        low, high = min(values), max(values)
        span = max(high - low, 0.1)  # a narrower axis would make noise look like an effect
        axes.set_ylim(low - 0.16 * span, high + 0.30 * span)
        axes.set_xscale("log", base=2)
        axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.3)
        _mark_training(axes, result)
        for label, mark in marks:
            axes.axhline(mark, color=MUTED, linestyle=(0, (1, 2.5)), linewidth=1.2)
            gaps = [abs(curve[end] - mark) for end in (ticks[0], ticks[-1])]
            x, ha = (ticks[0] / 1.22, "left") if gaps[0] > gaps[1] else (ticks[-1] * 1.28, "right")
            axes.annotate(f"{label}  {mark:.2f}", (x, mark), (0, 3), color=MUTED, ha=ha, **OFF)
        heights = [curve[n] for n in ticks]
        bars = [result.difference(n, depth).stderr or 0.0 for n in ticks]
        axes.errorbar(ticks, heights, bars, color=BLUE, marker="o", ms=5.5, capsize=3, zorder=3)
        for n in ticks:
            side, up = label_place(curve, n, flat=0.03 * span)
            if n == result.mean_recurrence:
                side = side or up  # keeps the label off the dashed line
            ha = ("center", "left", "right")[side]
            offset, text = (5 * side, 7 if up > 0 else -15), f"{curve[n]:.3f}"
            axes.annotate(text, (n, curve[n]), offset, color=BLUE, ha=ha, **OFF)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_xlabel("loops (same weights, run this many times)")
        axes.set_title("Held-out bits per byte, lower is better")
    return figure


def _mark_training(axes: Axes, result: TextResult) -> None:
    """Mark the depths that training drew, and their mean."""
    low, high = result.sampled_loops
    top = axes.get_ylim()[1]
    axes.axvspan(low / 1.06, high * 1.06, color=BAND, linewidth=0, zorder=0)
    axes.axvline(result.mean_recurrence, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    text = f"mean depth in training: {result.mean_recurrence:g}"
    text += f"\nshaded: depths drawn, {low} to {high}" if high > low else ""
    place = (result.mean_recurrence, top)
    axes.annotate(text, place, (4, -2), color=MUTED, fontsize=8.5, va="top", **OFF)


def training_curve(result: TextResult) -> Figure:
    """Training bits per byte over seconds, with the held-out points."""
    with styled():
        figure, axes = canvas(5.8, 3.1)
        known = [point for point in result.train_curve if math.isfinite(point[1])]
        seconds, raw = [time for time, _ in known], [value for _, value in known]
        smooth = smoothed(raw)
        axes.plot(seconds, raw, color=BLUE, linewidth=0.8, alpha=0.3)
        axes.plot(seconds, smooth, color=BLUE)
        shown = smooth[len(smooth) // 20 :] + [value for _, value in result.held_out_curve]
        if shown:
            low, high = min([*shown, *raw[len(raw) // 2 :]]), max(shown)
            span = max(high - low, 0.05)
            axes.set_ylim(low - 0.16 * span, high + 0.12 * span)
            high_up = [i for i, value in enumerate(smooth) if value > low + 0.6 * span]
            for index in high_up[-1:]:  # label beside the falling part, where there is room
                place = (seconds[index], smooth[index])
                axes.annotate("training", place, (9, 0), color=BLUE, weight="bold", **OFF)
        for time, value in result.held_out_curve:
            axes.plot(time, value, color=INK, marker="D", markersize=5, zorder=4)
        if result.held_out_curve:
            last = result.held_out_curve[-1]
            text = f"held out {last[1]:.2f}"
            offset = (4, -16 if smooth and last[1] < smooth[-1] else 11)
            axes.annotate(text, last, offset, color=INK, weight="bold", ha="right", **OFF)
        axes.set_xlabel("seconds of training")
        axes.set_title("Bits per byte while training")
        axes.set_xlim(left=0)
    return figure


# --- act 2 ---------------------------------------------------------------------------------------

_CELL_WIDTH, _CELL_HEIGHT = 0.50, 0.40  # inches
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.80, 1.42, 1.18, 0.12  # inches around the cells
_GAP = 0.35  # rows between trained and never-trained hops


def hops_grid(result: HopsResult, original: HopsResult | None = None) -> Figure:
    """The grid of accuracy as one panel, or two panels at the same scale."""
    panels = [result] if original is None else [result, original]
    sizes = [_panel_size(panel) for panel in panels]
    space = 0.35
    width = sum(size[0] for size in sizes) + space * (len(panels) - 1)
    height = max(size[1] for size in sizes)
    with styled():
        figure = figure_of(width, height)
        left = 0.0
        for panel, (panel_width, panel_height) in zip(panels, sizes, strict=True):
            inner = (panel_width - _LEFT - _RIGHT, panel_height - _TOP - _BOTTOM)
            bottom = height - panel_height + _BOTTOM
            box = ((left + _LEFT) / width, bottom / height, inner[0] / width, inner[1] / height)
            _draw_grid(figure.add_axes(box), panel)
            left += panel_width + space
    return figure


def _panel_size(result: HopsResult) -> tuple[float, float]:
    gap = _GAP if result.trained_hops and result.unseen_hops else 0.0
    rows, columns = len(result.hops) + gap, len(result.loops)
    height = _TOP + rows * _CELL_HEIGHT + _BOTTOM
    return _LEFT + columns * _CELL_WIDTH + _RIGHT, height


def _draw_grid(axes: Axes, result: HopsResult) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    split = len(result.trained_hops)
    gap = _GAP if 0 < split < len(result.hops) else 0.0
    rows = [i + (gap if i >= split else 0.0) for i in range(len(result.hops))]
    columns = len(result.loops)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows[-1] + 0.5, -0.5)
    axes.axis("off")
    for y, hops, row in zip(rows, result.hops, result.accuracy, strict=True):
        axes.text(-0.62, y, str(hops), ha="right", va="center")
        for x, value in enumerate(row):
            strength = 0.04 + 0.92 * min(max(value, 0.0), 1.0)
            colour = to_rgba(CELL, strength)
            axes.add_patch(Rectangle((x - 0.475, y - 0.46), 0.95, 0.92, fc=colour, lw=0))
            axes.text(
                x, y - 0.10, two_digits(value), ha="center", va="center", fontsize=9, color=INK
            )
    for first, last, label in ((0, split, "trained"), (split, len(rows), "never trained")):
        if last > first:
            ends = (rows[first] - 0.4, rows[last - 1] + 0.4)
            axes.plot([-1.14] * 2, ends, color=MUTED, linewidth=1.2, clip_on=False)
            label = label.replace(" ", "\n") if last - first < 3 else label
            side = -1.28 if "\n" not in label else -1.42
            middle = sum(ends) / 2
            axes.text(side, middle, label, color=MUTED, rotation=90, ha="center", va="center")
    if gap:
        y = (rows[split - 1] + rows[split]) / 2
        axes.plot([-1.14, columns + 1.85], [y, y], color=INK, linewidth=1.6, clip_on=False)
    _label_columns(axes, result)
    _draw_exit_rule(axes, result, rows)


def _label_columns(axes: Axes, result: HopsResult) -> None:
    """Title, loop counts, and the range of depths that training drew."""
    for x, loops in enumerate(result.loops):
        axes.text(x, -0.82, str(loops), ha="center", va="center")
    axes.text(-0.62, -0.82, "hops", ha="right", va="center", color=MUTED, fontsize=8.5)
    axes.text(-1.45, -2.72, result.name, weight="bold", fontsize=10.5, va="center")
    said = f"accuracy on held-out walks by hops and loops; chance {result.chance:.2f}"
    axes.text(-1.45, -2.20, said, color=MUTED, fontsize=8.5, va="center")
    ends = np.interp(result.trained_loops, result.loops, range(len(result.loops)))
    axes.plot(np.add(ends, (-0.42, 0.42)), [-1.27] * 2, color=MUTED, linewidth=3, clip_on=False)
    low, high = result.trained_loops
    said = f"loops (bar: {low} to {high} in training)"
    axes.text(-0.45, -1.56, said, color=MUTED, fontsize=8.5, va="center")


def _draw_exit_rule(axes: Axes, result: HopsResult, rows: Sequence[float]) -> None:
    """Draw the mean loops taken: a dot at the foot of each row, the number in the margin."""
    columns = len(result.loops)
    places = np.interp(result.exit_loops, result.loops, range(columns))
    feet = [y + 0.30 for y in rows]
    dot: dict[str, Any] = {
        "color": ORANGE,
        "markersize": 6.2,
        "mec": PAPER,
        "mew": 1.0,
        "clip_on": False,
    }
    axes.plot(places, feet, "o", zorder=5, **dot)
    left, right = columns + 0.22, columns + 1.44
    head: dict[str, Any] = {"ha": "center", "va": "center", "color": ORANGE, "fontsize": 8.5}
    axes.plot([left - 0.15], [-1.20], "o", **dot)
    axes.text(left + 0.10, -1.20, result.decider, weight="bold", **{**head, "ha": "left"})
    axes.text(left, -0.82, "loops", **head)
    axes.text(right, -0.82, "accuracy", **head)
    for y, loops, accuracy in zip(rows, result.exit_loops, result.exit_accuracy, strict=True):
        axes.text(left, y, f"{loops:.1f}", ha="center", va="center", color=ORANGE, weight="bold")
        axes.text(right, y, two_digits(accuracy), ha="center", va="center")


def stage_curve(result: HopsResult, original: HopsResult | None = None) -> Figure:
    """The curriculum's stage over steps."""
    with styled():
        figure, axes = canvas(5.8, 2.7)
        curves = [(result, BLUE)]
        if original is not None and original.stage_curve:
            curves.append((original, MUTED))
        for panel, colour in curves:
            steps = [step for step, _ in panel.stage_curve]
            stages = [stage for _, stage in panel.stage_curve]
            axes.plot(steps, stages, color=colour, drawstyle="steps-post")
            if steps:
                place = (steps[-1], stages[-1])
                axes.plot(*place, "o", color=colour, markersize=5)
                said = panel.name if len(curves) > 1 else f"{stages[-1]} hops"
                axes.annotate(said, place, (0, 7), color=colour, weight="bold", ha="right", **OFF)
        most = result.max_train_hops
        axes.set_ylim(0.5, most + 1)
        axes.set_yticks(sorted({1, *range(2, most + 1, 2), most} - {most - 1} | {1}))
        axes.set_xlim(left=0)
        axes.set_xlabel("training steps")
        axes.set_title("Longest walks in training, in hops")
    return figure
