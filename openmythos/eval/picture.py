"""The picture of scores by number of loops: one panel per task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmythos.analysis import picture as plots
from openmythos.eval.score import ScoreCurve

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 2.9, 2.5, 3  # inches; panels per row
LEFT, RIGHT, TOP, BOTTOM = 0.50, 0.14, 0.50, 0.46  # inches around a panel
OFFSET: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


def plot_score_curves(curves: Sequence[ScoreCurve], path: Path) -> None:
    """Write the picture of ``score_curves``."""
    plots.save(score_curves(curves), path)


def score_curves(curves: Sequence[ScoreCurve]) -> Any:
    """The picture: each curve with bars of one standard error; the best guesser as a line.

    Raises:
        ValueError: ``curves`` is empty.
    """
    if not curves:
        raise ValueError("there is no curve to draw; give at least one")
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    width, height = columns * PANEL_WIDTH, rows * PANEL_HEIGHT
    with plots.styled():
        figure = plots.figure_of(width, height)
        for index, curve in enumerate(curves):
            row, column = divmod(index, columns)
            left = (column * PANEL_WIDTH + LEFT) / width
            bottom = ((rows - 1 - row) * PANEL_HEIGHT + BOTTOM) / height
            inner = (PANEL_WIDTH - LEFT - RIGHT, PANEL_HEIGHT - TOP - BOTTOM)
            box = (left, bottom, inner[0] / width, inner[1] / height)
            _draw(figure.add_axes(box), curve)
    return figure


def _draw(axes: Any, curve: ScoreCurve) -> None:
    loops = list(curve.scores)
    values = [score.value for score in curve.scores.values()]
    errors = [score.stderr or 0.0 for score in curve.scores.values()]
    axes.errorbar(
        loops,
        values,
        yerr=errors,
        color=plots.BLUE,
        ecolor=plots.BLUE,
        elinewidth=1.2,
        capsize=2.5,
        marker="o",
        markersize=4.5,
        linewidth=1.6,
        zorder=3,
    )
    if curve.baselines:
        name, level = max(curve.baselines.items(), key=lambda item: item[1])
        axes.axhline(level, color=plots.MUTED, linestyle=(0, (1, 2.5)), linewidth=1.2)
        said = {"color": plots.MUTED, "fontsize": 8, "ha": "right", **OFFSET}
        place, right = (0.99, level), ("axes fraction", "data")
        axes.annotate(f"{name} {level:.2f}", place, (0, 3), xycoords=right, **said)
    axes.set_xscale("log", base=2)
    axes.set_xlim(loops[0] / 1.25, loops[-1] * 1.25)
    axes.set_xticks(loops, [str(n) for n in loops])
    axes.minorticks_off()
    axes.margins(y=0.16)
    axes.set_xlabel("loops")
    better = "" if curve.higher_is_better else ", lower is better"
    axes.set_title(f"{curve.task}\n", fontsize=9.5)
    axes.annotate(
        f"{curve.metric.replace('_', ' ')}{better}",
        (0, 1),
        (0, 6),
        xycoords="axes fraction",
        color=plots.MUTED,
        fontsize=8.5,
        **OFFSET,
    )
