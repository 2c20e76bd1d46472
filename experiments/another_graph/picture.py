"""Heat maps of hops against loops, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.another_graph.verdicts import BEFORE, HOPS_PER_LOOP, SAYS, SHOWN_HOPS
from openmythos.analysis.picture import BLUE, CELL, INK, ORANGE, PAPER, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {BEFORE: "Right answers in %: before, on its own graph"} | {
    arm: f"on another graph, {says}" for arm, says in SAYS.items()
}


def draw(data: Mapping[str, Any]) -> Figure:
    """A panel per arm, below each other; framed: two hops per loop."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("cells", [PAPER, CELL, BLUE])
    height = 1.75 * max(1, len(data)) + 0.2
    with styled():
        figure = figure_of(5.6, height)
        panels = figure.subplots(max(1, len(data)), squeeze=False).ravel()
        figure.subplots_adjust(0.1, 0.42 / height, 0.985, 1 - 0.3 / height, hspace=0.62)
        for axes, (arm, one) in zip(panels, data.items(), strict=False):
            _panel(axes, TITLES[arm], one["loops"], np.array(one["accuracy"]), colours)
    return figure


def _panel(axes: Axes, title: str, loops: list[int], values: np.ndarray, colours: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = PAPER if value > 0.8 else INK
        text = f"{100 * value:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, size=8.5)
    for row, hops in enumerate(SHOWN_HOPS):
        if hops // HOPS_PER_LOOP in loops:
            corner = (loops.index(hops // HOPS_PER_LOOP) - 0.5, row - 0.5)
            style: dict[str, Any] = {"fill": False, "edgecolor": ORANGE, "linewidth": 1.4}
            axes.add_patch(Rectangle(corner, 1, 1, **style))
    axes.set_title(title, fontsize=9.5, pad=4)
    axes.set_xticks(range(len(loops)), [str(n) for n in loops], fontsize=8.5)
    axes.set_yticks(range(len(values)), [str(h) for h in SHOWN_HOPS], fontsize=8.5)
    axes.set_xlabel("loops", labelpad=1)
    axes.set_ylabel("hops", labelpad=2)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
