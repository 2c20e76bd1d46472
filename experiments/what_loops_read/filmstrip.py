"""A reading map as a filmstrip: it grows by a row while the same weights run once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from openmythos.analysis.picture import (
    BAND,
    BLUE,
    CELL,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    figure_of,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Sequence[float | None]]  # a row per loop, a share per token; None where undefined

CELL_INCHES, HEAD_INCHES, GAP_INCHES = 0.155, 0.62, 0.16


def filmstrip(films: Mapping[str, Rows], columns: Sequence[str]) -> Figure:
    """A strip per map, a picture per loop.

    Args:
        films: Maps by what they are of; each has its own number of loops.
        columns: The tokens' names; long ones are cut to their first letter and their number.
    """
    most, wide = max(len(rows) for rows in films.values()), len(columns)
    panel = (wide * CELL_INCHES, most * CELL_INCHES)
    width = 0.45 + most * (panel[0] + GAP_INCHES)
    height = len(films) * (panel[1] + HEAD_INCHES + 0.25) + 0.1
    with styled():
        figure = figure_of(width, height)
        for place, (name, rows) in enumerate(films.items()):
            top = height - place * (panel[1] + HEAD_INCHES + 0.25)
            figure.text(0.4 / width, (top - 0.2) / height, name, weight="bold", size=10.5)
            shares = np.array([[np.nan if x is None else x for x in row] for row in rows])
            for loop in range(len(rows)):
                left = 0.4 + loop * (panel[0] + GAP_INCHES)
                tall = len(rows) * CELL_INCHES
                bottom = top - HEAD_INCHES - tall
                box = (left / width, bottom / height, panel[0] / width, tall / height)
                _frame(figure.add_axes(box), shares, loop)
                if loop == 0:
                    _names(figure.axes[-1], columns, len(rows))
    return figure


def _frame(axes: Axes, shares: np.ndarray, loop: int) -> None:
    """The map after a loop: its row is framed, the rows to come are empty."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("shares", [PAPER, CELL, BLUE]).with_extremes(
        bad=BAND
    )
    shown = np.full(shares.shape, np.nan)
    shown[: loop + 1] = shares[: loop + 1]
    axes.imshow(np.clip(shown, 0, 1), cmap=colours, vmin=0, vmax=1, aspect="auto")
    style: dict[str, Any] = {"fill": False, "edgecolor": ORANGE, "linewidth": 1.3, "clip_on": False}
    axes.add_patch(Rectangle((-0.5, loop - 0.5), shares.shape[1], 1, **style))
    axes.set_title(f"loop {loop + 1}", fontsize=8.5, color=INK, weight="normal", pad=4)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)


def _names(axes: Axes, columns: Sequence[str], loops: int) -> None:
    short = [f"{name[0]}{name.split()[-1]}" if " " in name else name[0] for name in columns]
    axes.set_xticks(range(len(columns)), short, fontsize=5.5, color=MUTED)
    axes.set_yticks(range(loops), [str(n + 1) for n in range(loops)], fontsize=6, color=MUTED)
    axes.tick_params(length=0, pad=1.5)
