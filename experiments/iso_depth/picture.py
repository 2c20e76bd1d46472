"""Bits per byte over loops at equal depth: a panel per width, a line per number of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Darker lines had more steps; the fewer layers of their own, the further to the right."""
    with styled():
        figure = figure_of(6.4, 3.2)
        widths = sorted({row["width"] for row in rows})
        panels = figure.subplots(1, max(1, len(widths)), sharey=True, squeeze=False)[0]
        for axes, width in zip(panels, widths, strict=False):
            lengths = sorted({row["steps"] for row in rows if row["width"] == width})
            for place, steps in enumerate(lengths, start=1):
                own = [row for row in rows if row["width"] == width and row["steps"] == steps]
                line = [row["loops"] for row in own], [row["bits"] for row in own]
                shade = place / len(lengths)
                axes.plot(
                    *line, "o-", color=BLUE, alpha=shade, markersize=3.5, label=f"{steps} steps"
                )
            axes.set_title(f"{width} wide")
            axes.set_xlabel("loops of six layers' depth")
            axes.set_xticks(sorted({row["loops"] for row in rows}))
        if rows:
            panels[0].set_ylabel("bits per byte")
            panels[-1].legend(fontsize=7, frameon=False)
        figure.tight_layout()
    return figure
