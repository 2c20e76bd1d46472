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
    "fixed": "One pair of layers, looped\nfour loops in training",
    "sampled": "The same, sampled depth\ntwo to eight loops in training",
    "stack": "Eight layers, each its own\npairs of layers as rows",
}


def draw(conclusion: Conclusion) -> "Mapping[str, Figure]":
    """Every figure of the study."""
    data = conclusion.figures
    return {"growing_map": growing_map(data["growing_map"]), "bits": bits(data["bits"])}


def growing_map(data: Mapping[str, Any]) -> "Figure":
    """Filmstrips of the first seed: the same weights loop after loop, and the stack's pairs."""
    films, words, most = {}, {}, max(one["hops"] for one in data.values())
    for arm, one in data.items():
        missing: list[float | None] = [None] * (most - one["hops"])
        said = f"{TITLES[arm]}; {one['hops']} hops, {100 * one['accuracy']:.0f} % right"
        films[said] = [[*row, *missing] for row in one["rows"]]
        words[said] = "pair" if arm == "stack" else "loop"
    return filmstrip(films, ["start", *(f"relation {hop}" for hop in range(1, most))], words)


def bits(data: Mapping[str, Any]) -> "Figure":
    """A dot per seed, the mean as a bar, and the greatest bits of shuffled loops."""
    height = 0.52 * len(data) + 1.2
    with styled():
        figure = figure_of(5.6, height)
        axes = figure.subplots()
        figure.subplots_adjust(0.03, 0.62 / height, 0.97, 1 - 0.42 / height)
        for place, (arm, one) in enumerate(data.items()):
            axes.plot([one["null"]] * 2, [place - 0.2, place + 0.2], color=ORANGE, linewidth=1.5)
            if one["bits"]:
                mean = float(np.mean(one["bits"]))
                axes.plot([0, mean], [place] * 2, color=CELL, linewidth=6, solid_capstyle="butt")
                axes.plot(one["bits"], [place] * len(one["bits"]), ".", color=INK, markersize=5)
            else:
                axes.text(0.02, place, "no loop works", va="center", color=MUTED, size=9)
            says = f"{arm.replace('_', ' ')}: {ARMS[arm].says}"
            axes.text(0, place - 0.27, says, va="bottom", size=9, color=INK)
        axes.set_yticks([])
        axes.set_ylim(len(data) - 0.6, -0.85)
        axes.set_xlim(0, 1.02)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("bits between a loop and the next; orange: with loops shuffled")
        axes.set_title("Do consecutive loops read different tokens?")
    return figure
