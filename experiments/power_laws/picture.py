"""Bits per byte over recurrence, a line per budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, ORANGE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Blue for the narrow model, orange for the wide one; darker lines are larger budgets."""
    with styled():
        figure = figure_of(6.4, 3.6)
        axes = figure.subplots()
        widths = sorted({row["width"] for row in rows})
        for width, colour in zip(widths, (BLUE, ORANGE), strict=False):
            budgets = sorted({row["flops"] for row in rows if row["width"] == width})
            for place, flops in enumerate(budgets, start=1):
                own = [row for row in rows if row["width"] == width and row["flops"] == flops]
                line = [row["loops"] for row in own], [row["bits"] for row in own]
                style = {"color": colour, "alpha": place / len(budgets), "marker": "o"}
                axes.plot(*line, **style, markersize=4, label=f"{width}, {flops:.1e}")
        axes.set_xlabel("loops in training and at the test")
        tried = sorted({row["loops"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tried, [str(loops) for loops in tried])
        axes.set_title("Bits per byte at equal training FLOPs")
        if rows:
            place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
            axes.legend(title="width, FLOPs", fontsize=8, frameon=False, **place)
        figure.tight_layout()
    return figure
