"""Memory of serving by tokens in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, MUTED, ORANGE, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_memory(data: dict[str, Any]) -> Figure:
    """A line per model; grey is the plain one."""
    figure = figure_of(6.4, 3.4)
    axes = figure.subplots()
    lines = zip(data["gigabytes"].items(), (MUTED, ORANGE, BLUE), ("--", "-", "-"), strict=True)
    for (name, values), colour, style in lines:
        axes.plot(data["tokens"], values, style, color=colour)
        axes.annotate(
            name, (data["tokens"][-1], values[-1]), xytext=(-4, 5), textcoords="offset points",
            ha="right", color=colour, fontsize=8,
        )  # fmt: skip
    axes.set_xlabel("tokens in the cache")
    axes.set_ylim(bottom=0)
    axes.set_title("GB of weights and cache: half the weights, twice the cache")
    figure.tight_layout()
    return figure
