"""Pictures of scores by number of loops, and of the quality and speed of exit rules."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmythos.analysis import picture as plots
from openmythos.eval.calibration import Frontier, Point
from openmythos.eval.score import ScoreCurve, in_words

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 2.9, 2.5, 3  # inches; panels per row
LEFT, RIGHT, TOP, BOTTOM = 0.50, 0.14, 0.50, 0.46  # inches around a panel
FOOT = 0.34  # inches below all panels, for what the bars mean
MARKERS = {
    "latent_difference": "s",
    "acceleration": "D",
    "kl": "^",
    "entropy_kl": "v",
    "argmax_stable": "P",
    "cumulative_threshold": "X",
}
OFFSET: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


def plot_before_after(
    before: Sequence[ScoreCurve], after: Sequence[ScoreCurve], path: Path
) -> None:
    """Write the picture of ``before_after``."""
    plots.save(before_after(before, after), path)


def before_after(before: Sequence[ScoreCurve], after: Sequence[ScoreCurve]) -> Any:
    """The picture: each curve after training, and the one before it in grey."""
    columns = min(COLUMNS, len(after))
    rows = -(-len(after) // columns)
    with plots.styled():
        figure = plots.figure_of(columns * PANEL_WIDTH, rows * PANEL_HEIGHT)
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        figure.subplots_adjust(0.5 / (columns * PANEL_WIDTH), 0.48 / (rows * PANEL_HEIGHT), 0.98)
        figure.subplots_adjust(top=1 - 0.5 / (rows * PANEL_HEIGHT), hspace=0.6, wspace=0.3)
        for axes, old, new in zip(panels, before, after, strict=False):
            _draw(axes, new)
            values = [score.value for score in old.scores.values()]
            style: dict[str, Any] = {"color": plots.MUTED, "linewidth": 1.2, "markersize": 3.5}
            axes.plot(list(old.scores), values, marker="s", linestyle="--", label="before", **style)
            # Beside the title: a curve may be anywhere below.
            place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.04, 1.11)}
            axes.legend(frameon=False, fontsize=8, handlelength=1.6, **place)
        for axes in panels[len(after) :]:
            axes.set_visible(False)
    return figure


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


# --- exit rules -----------------------------------------------------------------------------------


def plot_frontier(found: Frontier, path: Path) -> None:
    """Write the picture of ``frontier_picture``."""
    plots.save(frontier_picture(found), path)


def frontier_picture(found: Frontier) -> Any:
    """Quality over speed: fixed depths as a line with their loops, rules as marks by kind."""
    depths = [point for point in found.points if point.setting.exit_rule is None]
    depths.sort(key=lambda point: point.setting.num_loops)
    with plots.styled():
        figure = plots.figure_of(7.0, 4.0)
        axes = figure.add_axes((0.09, 0.13, 0.61, 0.74))
        axes.grid(True, axis="both")
        style: dict[str, Any] = {"color": plots.BLUE, "zorder": 2}
        axes.plot(*_places(found, depths), marker="o", markersize=4, label="fixed depth", **style)
        for point in _apart(found, depths):
            place = (found.tokens_per_s(point), point.score.value)
            loops = point.setting.num_loops
            axes.annotate(f"{loops}", place, (3, 4), color=plots.BLUE, fontsize=8, **OFFSET)
        for kind, marker in MARKERS.items():
            rules = [
                p for p in found.points if p.setting.exit_rule and p.setting.exit_rule.kind == kind
            ]
            if rules:
                look: dict[str, Any] = {
                    "marker": marker,
                    "linestyle": "",
                    "markersize": 5,
                    "zorder": 3,
                }
                look |= {"color": plots.ORANGE, "markerfacecolor": plots.PAPER}
                axes.plot(*_places(found, rules), label=f"rule: {kind.replace('_', ' ')}", **look)
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 12,
            "markerfacecolor": "none",
            "linestyle": "",
        }
        axes.plot(
            *_places(found, [found.chosen]), color=plots.INK, label="chosen", zorder=4, **ring
        )
        sign = 1 if found.metric == "bits_per_byte" else -1
        limit = found.best.score.value + sign * found.within
        line: dict[str, Any] = {"color": plots.MUTED, "linestyle": (0, (1, 2.5)), "linewidth": 1.2}
        axes.axhline(
            limit, label=f"best depth's {'+' if sign == 1 else '-'} {found.within:g}", **line
        )
        _frontier_limits(axes, found, sign)
        axes.set_xlabel("tokens per second")
        better = ", lower is better" if sign == 1 else ""
        axes.set_title(f"{in_words(found.metric)}{better}")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8.5)
    return figure


def _places(found: Frontier, points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [found.tokens_per_s(point) for point in points], [point.score.value for point in points]


def _apart(found: Frontier, depths: Sequence[Point]) -> list[Point]:
    """Those whose labels do not cover that of a shallower one."""
    gap = 0.04 * max(found.tokens_per_s(point) for point in depths)
    labelled: list[Point] = []
    for point in depths:
        if not labelled or found.tokens_per_s(point) < found.tokens_per_s(labelled[-1]) - gap:
            labelled.append(point)
    return labelled


def _frontier_limits(axes: Any, found: Frontier, sign: int) -> None:
    """Show what is near the best quality; what is far worse lies outside."""
    losses = sorted(max(0.0, found.loss(point).value) for point in found.points)
    far = max(4 * found.within, losses[len(losses) // 2] * 1.2, 1e-4)
    gain = max(0.0, *(-found.loss(point).value for point in found.points))
    best, room = found.best.score.value, 0.08 * far
    ends = sorted((best - sign * (gain + room), best + sign * (far + room)))
    axes.set_ylim(*ends)
    near = [p for p in found.points if ends[0] <= p.score.value <= ends[1]]
    speeds = [found.tokens_per_s(point) for point in near]
    beside = 0.06 * (max(speeds) - min(speeds)) or 1.0
    axes.set_xlim(min(speeds) - beside, max(speeds) + 2 * beside)
