"""Wins and losses: the loop against a stack of equal parameters and one of equal FLOPs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, INK, ORANGE, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAID = {
    "shallow": ("equal parameters: six loops against one", BLUE),
    "deep": ("equal FLOPs: one layer six times against six layers", ORANGE),
}
NAMES = {
    "facts": "recall of 16,384 facts",
    "products": "products of S3",
    "induction": "induction, 1 to 3 hops",
}


def draw_gaps(rows: list[dict[str, Any]]) -> Figure:
    """Bars right of zero are wins of the loop; lines are intervals over seeds."""
    figure = figure_of(6.4, 3.2)
    axes = figure.subplots()
    tasks = [task for task in NAMES if any(row["task"] == task for row in rows)]
    for row in rows:
        place = tasks.index(row["task"]) + (-0.18 if row["against"] == "shallow" else 0.18)
        _, colour = SAID[row["against"]]
        axes.barh(
            place, row["gap"], height=0.32, color=colour, alpha=1 if row["is_result"] else 0.35
        )
        axes.plot(
            [max(-1, row["low"]), min(1, row["high"])], [place, place], color=INK, linewidth=1
        )
        side = 1 if row["gap"] >= 0 else -1
        axes.annotate(
            f"{row['loop']:.2f} against {row['other']:.2f}", (row["gap"], place),
            xytext=(6 * side, 7), textcoords="offset points", fontsize=7, color=INK,
            ha="left" if side > 0 else "right", va="center",
        )  # fmt: skip
    for label, colour in SAID.values():
        axes.plot([], [], color=colour, linewidth=6, label=label)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(tasks)), [NAMES[task] for task in tasks])
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xlim(-1, 1)
    axes.grid(visible=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, -0.38), frameon=False, fontsize=8)
    axes.set_title("Accuracy of the loop minus that of the stack")
    figure.tight_layout()
    return figure
