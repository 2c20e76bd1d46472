"""Wins and losses: the loop against a stack of equal parameters and one of equal FLOPs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, INK, MUTED, ORANGE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAID = {"shallow": ("equal parameters", BLUE), "deep": ("equal FLOPs", ORANGE)}
NAMES = {
    "facts": "Recall of 16,384 facts",
    "products": "Products of S3",
    "induction": "Induction, 1 to 3 hops",
}
NUMBERS = 1.06  # where the scores stand, right of the bars


def draw_gaps(rows: list[dict[str, Any]]) -> Figure:
    """Bars right of zero are wins of the loop; lines are intervals over seeds."""
    tasks = [task for task in NAMES if any(row["task"] == task for row in rows)]
    height = 1.0 * len(tasks) + 1.75
    with styled():
        figure = figure_of(5.6, height)
        axes = figure.subplots()
        figure.subplots_adjust(0.27, 1.1 / height, 0.78, 1 - 0.62 / height)
        for place, task in enumerate(tasks):
            style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
            axes.text(-0.5, place - 0.26, NAMES[task], weight="bold", size=9.5, **style)
        for row in rows:
            _bar(axes, row, tasks.index(row["task"]) + (0 if row["against"] == "shallow" else 0.3))
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks([])
        axes.set_ylim(len(tasks) - 0.5, -0.65)
        axes.set_xlim(-1, 1)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["-1", "-.5", "0", ".5", "1"])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("stack is better            loop is better")
        title = "Accuracy of the loop minus that of the stack"
        figure.text(0.02, 1 - 0.24 / height, title, weight="bold", size=10.5)
        head: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "color": MUTED}
        axes.text(NUMBERS, -0.68, "loop, stack", ha="left", size=8.5, **head)
        notes = (
            "One layer six times against the same layer once (equal",
            "parameters) and against six layers (equal FLOPs). Lines: 95 %",
            "over seeds; hatched: under two seed deviations.",
        )
        for line, words in enumerate(notes):
            figure.text(0.02, (0.47 - 0.17 * line) / height, words, color=MUTED, size=8.5)
    return figure


def _bar(axes: Axes, row: dict[str, Any], place: float) -> None:
    said, colour = SAID[row["against"]]
    looks: dict[str, Any] = {"color": colour}
    if not row["is_result"]:
        looks = {"facecolor": "none", "edgecolor": colour, "hatch": "////"}
    axes.barh(place, row["gap"], height=0.26, **looks)
    ends = [max(-1, row["low"]), min(1, row["high"])]
    axes.plot(ends, [place, place], color=INK, linewidth=1)
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "size": 9}
    axes.text(-0.03, place, said, ha="right", color=INK, **style)
    axes.text(NUMBERS, place, f"{row['loop']:.2f}, {row['other']:.2f}", ha="left", **style)
