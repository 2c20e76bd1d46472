"""The picture of scores by number of loops: one panel per task, one axis per metric."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmythos.analysis import picture as plots
from openmythos.eval.score import ScoreCurve, in_words

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 2.9, 2.5, 3  # inches; panels per row
LEFT, RIGHT, TOP, BOTTOM = 0.50, 0.14, 0.50, 0.46  # inches around a panel
FOOT = 0.34  # inches below all panels, for what the bars mean
OFFSET: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


def plot_score_curves(curves: Sequence[ScoreCurve], path: Path) -> None:
    """Write the picture of ``score_curves``."""
    plots.save(score_curves(curves), path)


def score_curves(curves: Sequence[ScoreCurve]) -> Any:
    """The picture: each curve; the best guesser as a line.

    Bars are one standard error of the difference to the fewest loops: the questions are the same,
    so the scores' own errors would say nothing about what loops change. Panels of one metric have
    the same axis.

    Raises:
        ValueError: ``curves`` is empty.
    """
    if not curves:
        raise ValueError("there is no curve to draw; give at least one")
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    width, height = columns * PANEL_WIDTH, rows * PANEL_HEIGHT + FOOT
    limits = {kind: _limits([c for c in curves if c.metric == kind]) for kind in _kinds(curves)}
    with plots.styled():
        figure = plots.figure_of(width, height)
        for index, curve in enumerate(curves):
            row, column = divmod(index, columns)
            left = (column * PANEL_WIDTH + LEFT) / width
            bottom = ((rows - 1 - row) * PANEL_HEIGHT + BOTTOM + FOOT) / height
            inner = (PANEL_WIDTH - LEFT - RIGHT, PANEL_HEIGHT - TOP - BOTTOM)
            box = (left, bottom, inner[0] / width, inner[1] / height)
            axes = figure.add_axes(box)
            axes.set_ylim(*limits[curve.metric])
            _draw(axes, curve)
        style: dict[str, Any] = {"color": plots.MUTED, "fontsize": 8, "va": "bottom"}
        figure.text(0.1 / width, 0.08 / height, _foot(curves), **style)
    return figure


def _kinds(curves: Sequence[ScoreCurve]) -> list[str]:
    return list(dict.fromkeys(curve.metric for curve in curves))


def _errors(curve: ScoreCurve) -> list[float]:
    """The lengths of the bars: of the paired differences where there are any."""
    shown = curve.differences or curve.scores
    return [shown[n].stderr or 0.0 if n in shown else 0.0 for n in curve.scores]


def _limits(curves: Sequence[ScoreCurve]) -> tuple[float, float]:
    """The ends of an axis on which all these curves, their bars and their lines can be seen."""
    values = [level for curve in curves for level in _lines(curve).values()]
    for curve in curves:
        for score, error in zip(curve.scores.values(), _errors(curve), strict=True):
            values += [score.value - error, score.value + error]
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    room = 0.16 * (high - low) or 0.05
    return low - room, high + room


def _lines(curve: ScoreCurve) -> dict[str, float]:
    """The best guesser."""
    best = max(curve.baselines.items(), key=lambda item: item[1], default=None)
    return {} if best is None else dict([best])


def _foot(curves: Sequence[ScoreCurve]) -> str:
    several = [curve for curve in curves if curve.differences]
    if not several:
        return "Bars: one standard error."
    first = min(several[0].scores)
    return (
        "Bars: one standard error of the difference\n"
        f"to {first} loop{'' if first == 1 else 's'}, question by question."
    )


def _draw(axes: Any, curve: ScoreCurve) -> None:
    loops = list(curve.scores)
    values = [score.value for score in curve.scores.values()]
    axes.errorbar(
        loops,
        values,
        yerr=_errors(curve),
        color=plots.BLUE,
        ecolor=plots.BLUE,
        elinewidth=1.2,
        capsize=2.5,
        marker="o",
        markersize=4.5,
        linewidth=1.6,
        zorder=3,
    )
    for name, level in _lines(curve).items():
        axes.axhline(level, color=plots.MUTED, linestyle=(0, (1, 2.5)), linewidth=1.2)
        said = {"color": plots.MUTED, "fontsize": 8, "ha": "right", **OFFSET}
        place, right = (0.99, level), ("axes fraction", "data")
        axes.annotate(f"{name} {level:.2f}", place, (0, 3), xycoords=right, **said)
    axes.set_xscale("log", base=2)
    axes.set_xlim(loops[0] / 1.25, loops[-1] * 1.25)
    axes.set_xticks(loops, [str(n) for n in loops])
    axes.minorticks_off()
    axes.set_xlabel("loops")
    better = "" if curve.higher_is_better else ", lower is better"
    axes.set_title(f"{curve.task}\n", fontsize=9.5)
    axes.annotate(
        f"{in_words(curve.metric)}{better}",
        (0, 1),
        (0, 6),
        xycoords="axes fraction",
        color=plots.MUTED,
        fontsize=8.5,
        **OFFSET,
    )
