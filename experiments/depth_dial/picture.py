"""The figures: heat maps of hops against loops, and accuracy at the best loops by hops."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.claim import Conclusion
from experiments.depth_dial.arms import ARMS, HOPS_PER_LOOP, STACKS, TRAINED_HOPS
from openmythos.analysis.picture import (
    BAND,
    BLUE,
    CELL,
    GRID,
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

SHOWN_HOPS, SHOWN_LOOPS = range(1, 17), range(1, 17)
NAMES = {
    "fixed_longest": "4 loops, longest walks only: none to spare",
    "fixed_mixed": "4 loops, mixed walks",
    "sampled_longest": "2 to 8 loops, longest walks only",
    "sampled_mixed": "2 to 8 loops, mixed walks",
}


def draw(conclusion: Conclusion) -> "Mapping[str, Figure]":
    """Every figure of the study."""
    data = conclusion.figures
    return {
        "stepping_and_holding": heat_maps(data["stepping_and_holding"]),
        "reach": reach(data["reach"]),
    }


def heat_maps(data: Mapping[str, Any]) -> "Figure":
    """Accuracy by hops (rows) and loops (columns) of the four main arms."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("cells", [PAPER, CELL, BLUE])
    with styled():
        figure = figure_of(9.2, 9.0)
        panels = figure.subplots(2, 2).ravel()
        figure.subplots_adjust(0.07, 0.07, 0.985, 0.90, wspace=0.16, hspace=0.24)
        figure.text(
            0.02,
            0.965,
            "The same weights at other loops and on other walks",
            weight="bold",
            size=13,
        )
        said = (
            "Accuracy in % on held-out walks, mean over seeds; chance 6. Below the line: walks "
            "longer than any in training. Dots: two hops per loop."
        )
        figure.text(0.02, 0.938, said, color=MUTED, size=9)
        for axes, (arm, accuracy) in zip(panels, data["accuracy"].items(), strict=False):
            rows = [data["hops"].index(h) for h in SHOWN_HOPS]
            columns = [data["loops"].index(n) for n in SHOWN_LOOPS if n in data["loops"]]
            _panel(axes, NAMES[arm], np.array(accuracy)[np.ix_(rows, columns)], colours)
    return figure


def _panel(axes: "Axes", name: str, values: np.ndarray, colours: Any) -> None:
    axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = PAPER if value > 0.8 else INK if value > 0.15 else MUTED
        text = f"{100 * value:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, size=6.2)
    hops = np.arange(HOPS_PER_LOOP, len(values) + 1, HOPS_PER_LOOP)
    axes.plot(hops / HOPS_PER_LOOP - 1 + 0.38, hops - 1 - 0.32, ".", color=ORANGE, markersize=4)
    axes.axhline(TRAINED_HOPS - 0.5, color=INK, linewidth=1.4)
    loops = [str(n) for n in SHOWN_LOOPS[: values.shape[1]]]
    axes.set_title(name, fontsize=10)
    axes.set_xticks(range(values.shape[1]), loops, fontsize=7.5)
    axes.set_yticks(range(len(values)), [str(h) for h in SHOWN_HOPS], fontsize=7.5)
    axes.set_xlabel("loops")
    axes.set_ylabel("hops")
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)


def reach(data: Mapping[str, Any]) -> "Figure":
    """Accuracy at the best loops by hops: looped arms, and what is changed about one of them."""
    groups: Sequence[tuple[str, tuple[str, ...]]] = (
        ("Depth and walks in training", tuple(NAMES)),
        (
            "Four loops, longest walks, and ...",
            ("fixed_longest", "every_loop", "on_the_way", "rope", "drawn_positions"),
        ),
        ("Plain stacks", ("fixed_longest", *STACKS)),
    )
    with styled():
        figure = figure_of(11.0, 4.0)
        panels = figure.subplots(1, 3, sharey=True)
        figure.subplots_adjust(0.05, 0.13, 0.99, 0.86, wspace=0.08)
        for axes, (title, arms) in zip(panels, groups, strict=True):
            _curves(axes, data, [arm for arm in arms if arm in data["arms"]])
            axes.set_title(title)
            axes.set_xlabel("hops")
        panels[0].set_ylabel("accuracy at the best loops")
    return figure


def _curves(axes: "Axes", data: Mapping[str, Any], arms: Sequence[str]) -> None:
    colours = (BLUE, ORANGE, INK, "#3f8f5f", "#8a5fbf")
    hops = [h for h in data["hops"] if h >= 2]
    start = data["hops"].index(hops[0])
    axes.axvspan(hops[0], TRAINED_HOPS, color=BAND, zorder=0)
    axes.text(TRAINED_HOPS - 0.2, 1.02, "trained", ha="right", color=MUTED, size=8)
    for colour, arm in zip(colours, arms, strict=False):
        mean, low, high = (values[start:] for values in data["arms"][arm])
        axes.fill_between(hops, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(hops, mean, color=colour, marker="o", markersize=2.8, label=ARMS[arm].says)
    axes.set_xscale("log", base=2)
    ticks = [2, 4, 8, 10, 12, 16, 24, 32]
    axes.set_xticks(ticks, [str(h) for h in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08)
    axes.axhline(1 / 16, color=GRID, linewidth=1)
    axes.legend(frameon=False, fontsize=7.2, loc="lower left")
