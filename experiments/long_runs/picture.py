"""Bits per byte over recurrence, a line per budget; right answers over held-out facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, GRID, INK, MUTED, ORANGE, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_losses(rows: list[dict[str, Any]]) -> Figure:
    """Blue for the narrow model, orange for the wide one; darker lines are larger budgets."""
    figure = figure_of(6.4, 3.6)
    axes = figure.subplots()
    widths = sorted({row["width"] for row in rows})
    for width, colour in zip(widths, (BLUE, ORANGE), strict=False):
        budgets = sorted({row["flops"] for row in rows if row["width"] == width})
        for place, flops in enumerate(budgets, start=1):
            own = [row for row in rows if row["width"] == width and row["flops"] == flops]
            line = [row["loops"] for row in own], [row["bits"] for row in own]
            axes.plot(
                *line, color=colour, alpha=place / len(budgets), label=f"{width}, {flops:.1e}"
            )
    axes.set_xlabel("loops in training and at the test")
    axes.set_title("Bits per byte at equal training FLOPs")
    if rows:
        axes.legend(title="width, FLOPs", fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def draw_two_hops(scores: dict[str, dict[str, list[float]]]) -> Figure:
    """Bars by kind of question: one per arm, with every seed as a dot."""
    figure = figure_of(6.4, 3.6)
    axes = figure.subplots()
    kinds = {
        "facts": "the facts",
        "trained": "trained walks",
        "same_facts": "others over\nthe same facts",
        "new_facts": "over facts that no\nsuch walk had",
    }
    looks = {
        "facts_loop": ("2 layers, 4 times", BLUE),
        "facts_shallow": ("2 layers", GRID),
        "facts_deep": ("8 layers", MUTED),
    }
    for number, (arm, own) in enumerate(scores.items()):
        name, colour = looks[arm]
        places = [place + 0.26 * (number - 1) for place in range(len(kinds))]
        means = [sum(own[kind]) / max(1, len(own[kind])) for kind in kinds]
        axes.bar(places, means, width=0.24, color=colour, label=name)
        for place, kind in zip(places, kinds, strict=True):
            axes.plot([place] * len(own[kind]), own[kind], ".", color=INK, markersize=3)
    axes.set_xticks(range(len(kinds)), list(kinds.values()))
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title("Right answers, by what training had of the walk")
    if scores:
        axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper right")
    figure.tight_layout()
    return figure
