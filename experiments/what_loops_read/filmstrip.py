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

WIDTH, IN_A_ROW = 5.6, 6  # inches, so that words can be read on a telephone; pictures in a row
LEFT, RIGHT, GAP = 0.26, 0.08, 0.1
CELL_HEIGHT, TITLE_HEIGHT, NAME_HEIGHT, FOOT_HEIGHT = 0.17, 0.52, 0.25, 0.24


def filmstrip(
    films: Mapping[str, Rows], columns: Sequence[str], words: Mapping[str, str] | None = None
) -> Figure:
    """A strip per map, a picture per loop, six in a row.

    Args:
        films: Maps by what they are of, in one line or two; each has its own number of loops.
        columns: The tokens' names; the first and the last are written below the first picture.
        words: What a row is, by the map; default: a loop.
    """
    strips = [-(-len(rows) // IN_A_ROW) for rows in films.values()]
    tall = [len(rows) * CELL_HEIGHT + NAME_HEIGHT + FOOT_HEIGHT for rows in films.values()]
    height = sum(TITLE_HEIGHT + n * t for n, t in zip(strips, tall, strict=True)) + 0.2
    wide = (WIDTH - LEFT - RIGHT - GAP * (IN_A_ROW - 1)) / IN_A_ROW
    top = height
    with styled():
        figure = figure_of(WIDTH, height)
        for (name, rows), own_height in zip(films.items(), tall, strict=True):
            title, _, more = name.partition("\n")
            figure.text(0.1 / WIDTH, (top - 0.22) / height, title, weight="bold", size=10.5)
            figure.text(0.1 / WIDTH, (top - 0.42) / height, more, color=MUTED, size=9.5)
            top -= TITLE_HEIGHT
            shares = np.array([[np.nan if x is None else x for x in row] for row in rows])
            for loop in range(len(rows)):
                line, place = divmod(loop, IN_A_ROW)
                bottom = top - line * own_height - NAME_HEIGHT - len(rows) * CELL_HEIGHT
                left = LEFT + place * (wide + GAP)
                box = (left, bottom, wide, len(rows) * CELL_HEIGHT)
                size = (WIDTH, height, WIDTH, height)
                axes = figure.add_axes([a / b for a, b in zip(box, size, strict=True)])
                _frame(axes, shares, loop, (words or {}).get(name, "loop"))
                if place == 0:
                    _names(axes, columns, len(rows))
            top -= own_height * -(-len(rows) // IN_A_ROW)
    return figure


def _frame(axes: Axes, shares: np.ndarray, loop: int, word: str) -> None:
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
    axes.set_title(f"{word} {loop + 1}", fontsize=9, color=INK, weight="normal", pad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)


def _names(axes: Axes, columns: Sequence[str], loops: int) -> None:
    """Loops on the left; below, wider than the picture, the first and the last token."""
    axes.set_yticks(range(loops), [str(n + 1) for n in range(loops)], fontsize=7.5, color=MUTED)
    axes.tick_params(length=0, pad=1.5)
    said = f"{columns[0]} to {columns[-1]}"
    axes.text(-0.5, loops - 0.35, said, color=MUTED, fontsize=8, va="top", ha="left")
