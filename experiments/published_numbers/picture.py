"""Memory of serving by tokens in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, MUTED, OFF, ORANGE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_memory(data: dict[str, Any]) -> Figure:
    """A line per model; grey is the plain one."""
    with styled():
        figure = figure_of(6.4, 3.4)
        axes = figure.subplots()
        tokens = data["tokens"]
        lines = zip(data["gigabytes"].items(), (MUTED, ORANGE, BLUE), ("--", "-", "-"), strict=True)
        for (name, values), colour, style in lines:
            axes.plot(tokens, values, style, color=colour)
            place = {"ha": "left", "va": "center", "fontsize": 8.5, **OFF}
            axes.annotate(name, (tokens[-1], values[-1]), (6, 0), color=colour, **place)
        axes.set_xlabel("tokens in the cache")
        axes.set_xlim(0, tokens[-1])
        axes.set_ylim(bottom=0)
        axes.set_title("GB of weights and cache: half the weights, twice the cache")
        figure.subplots_adjust(0.07, 0.15, 0.67, 0.90)
    return figure
