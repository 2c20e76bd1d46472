"""The figures: the map growing row by row, and bits between loops by arm."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.claim import Conclusion
from experiments.what_loops_read.arms import ARMS
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

TITLES = {
    "fixed": "One pair of layers, looped: four loops in training",
    "sampled": "One pair of layers, looped: two to eight loops in training",
    "stack": "Eight layers, each its own: pairs of them as rows",
}


def draw(conclusion: Conclusion) -> "Mapping[str, Figure]":
    """Every figure of the study."""
    data = conclusion.figures
    return {"growing_map": growing_map(data["growing_map"]), "bits": bits(data["bits"])}


def growing_map(data: Mapping[str, Any]) -> "Figure":
    """A filmstrip of the fixed arm: a frame per loop; below it the sampled arm and the stack."""
    frames = len(data["fixed"]["rows"])
    others = [arm for arm in ("sampled", "stack") if arm in data]
    with styled():
        figure = figure_of(11.0, 5.6)
        grid = figure.add_gridspec(2, 1, left=0.055, right=0.99, top=0.83, bottom=0.09, hspace=0.6)
        head = "What each loop reads"
        figure.text(0.015, 0.955, head, weight="bold", size=13)
        said = (
            "Share of the effect on the answer when a token is corrupted during one loop only. "
            f"Above: the same weights, loop after loop, {data['fixed']['hops']} hops, which were "
            "never trained."
        )
        figure.text(0.015, 0.915, said, color=MUTED, size=9)
        strip = grid[0].subgridspec(1, frames, wspace=0.12)
        for frame in range(frames):
            axes = figure.add_subplot(strip[frame])
            _map(axes, data["fixed"]["rows"], upto=frame + 1, labels=frame == 0)
            axes.set_title(f"after loop {frame + 1}", fontsize=9)
        below = grid[1].subgridspec(1, max(1, len(others)), wspace=0.18)
        for place, arm in enumerate(others):
            axes = figure.add_subplot(below[place])
            one = data[arm]
            _map(axes, one["rows"], upto=len(one["rows"]), labels=True)
            said = f"{TITLES[arm]}; {one['hops']} hops, {100 * one['accuracy']:.0f} % right"
            axes.set_title(said, fontsize=9)
    return figure


def _map(axes: "Axes", rows: Sequence[Sequence[float | None]], upto: int, labels: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("cells", [PAPER, CELL, BLUE])
    colours = colours.with_extremes(bad=BAND)
    values = np.array(rows, dtype=float)
    values[upto:] = np.nan
    axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(values)), [str(n + 1) for n in range(len(values))], fontsize=7.5)
    columns = ["start", *(str(n) for n in range(1, values.shape[1]))]
    axes.set_xticks(range(len(columns)), columns, fontsize=6.5)
    axes.grid(visible=False)
    if labels:
        axes.set_ylabel("loop")
        axes.set_xlabel("relation")
    for side in axes.spines.values():
        side.set_visible(False)


def bits(data: Mapping[str, Any]) -> "Figure":
    """A dot per seed, the mean as a bar, and the greatest bits of shuffled loops."""
    with styled():
        figure = figure_of(8.4, 0.42 * len(data) + 1.1)
        axes = figure.subplots()
        figure.subplots_adjust(0.44, 0.16, 0.98, 0.88)
        for place, one in enumerate(data.values()):
            axes.plot([one["null"]] * 2, [place - 0.3, place + 0.3], color=ORANGE, linewidth=1.5)
            if one["bits"]:
                mean = float(np.mean(one["bits"]))
                axes.plot([0, mean], [place] * 2, color=CELL, linewidth=7, solid_capstyle="butt")
                axes.plot(one["bits"], [place] * len(one["bits"]), ".", color=INK, markersize=5)
            else:
                axes.text(0.02, place, "no loop works", va="center", color=MUTED, size=8.5)
        axes.set_yticks(range(len(data)), [f"{arm}: {ARMS[arm].says}" for arm in data], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("bits between what a loop reads and what the next one reads")
        axes.set_title("Do consecutive loops read different tokens?", fontsize=10)
        axes.text(
            0.99,
            1.03,
            "line: shuffled loops",
            color=ORANGE,
            size=8,
            ha="right",
            transform=axes.transAxes,
        )
    return figure
