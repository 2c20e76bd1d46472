"""The figures: the map growing row by row, and bits between loops by arm."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.claim import Conclusion
from experiments.what_loops_read.arms import ARMS
from experiments.what_loops_read.filmstrip import filmstrip
from openmythos.analysis.picture import (
    CELL,
    INK,
    MUTED,
    ORANGE,
    figure_of,
    styled,
)

if TYPE_CHECKING:
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
    """Filmstrips of the first seed: the same weights loop after loop, and the stack's pairs."""
    films, most = {}, max(one["hops"] for one in data.values())
    for arm, one in data.items():
        missing: list[float | None] = [None] * (most - one["hops"])
        said = f"{TITLES[arm]}; {one['hops']} hops, {100 * one['accuracy']:.0f} % right"
        films[said] = [[*row, *missing] for row in one["rows"]]
    return filmstrip(films, ["start", *(f"relation {hop}" for hop in range(1, most))])


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
        axes.set_xlabel(
            "bits between what a loop reads and the next one reads; line: loops shuffled"
        )
        axes.set_title("Do consecutive loops read different tokens?", fontsize=10)
    return figure
