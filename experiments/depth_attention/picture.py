"""Bits per byte of every seed, an arm per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmythos.analysis.picture import BLUE, INK, MUTED, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "depth_attention": "every loop kept,\ndepth attention",
    "plain": "every loop kept",
    "last_loop": "last loop kept,\ntwice the heads",
}


def draw(bits: dict[str, list[float]]) -> Figure:
    """A dot per seed, a line at the mean."""
    with styled():
        figure = figure_of(6.4, 2.4)
        axes = figure.subplots()
        for place, (arm, values) in enumerate(bits.items()):
            colour = BLUE if arm == "depth_attention" else MUTED
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=5)
            if values:
                mean = sum(values) / len(values)
                axes.plot([mean, mean], [place - 0.25, place + 0.25], color=INK, linewidth=1.2)
        axes.set_yticks(range(len(bits)), [NAMES[arm] for arm in bits])
        axes.set_ylim(len(bits) - 0.5, -0.5)
        axes.set_title("Bits per byte at equal bytes of cache, a dot per seed")
        figure.tight_layout()
    return figure
