"""Accuracy over hops and loops as a heat map, one panel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from openmythos.analysis.picture import BLUE, CELL, INK, ORANGE, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def hops_by_loops(
    axes: "Axes",
    title: str,
    hops: Sequence[int],
    loops: Sequence[int],
    values: np.ndarray,
    hops_per_loop: int,
) -> None:
    """Draw ``values``, 0 to 1, in %; framed are the loops that do so many hops each."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("cells", [PAPER, CELL, BLUE])
    axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = PAPER if value > 0.8 else INK
        text = f"{100 * value:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, size=8.5)
    for row, number in enumerate(hops):
        if number // hops_per_loop in loops:
            corner = (list(loops).index(number // hops_per_loop) - 0.5, row - 0.5)
            style: dict[str, Any] = {"fill": False, "edgecolor": ORANGE, "linewidth": 1.4}
            axes.add_patch(Rectangle(corner, 1, 1, **style))
    axes.set_title(title, fontsize=10, pad=5)
    axes.set_xticks(range(len(loops)), [str(n) for n in loops], fontsize=8.5)
    axes.set_yticks(range(len(hops)), [str(h) for h in hops], fontsize=8.5)
    axes.set_xlabel("loops", labelpad=1)
    axes.set_ylabel("hops", labelpad=2)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
