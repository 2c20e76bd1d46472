"""The figures: heat maps of hops against loops, and accuracy at the best loops by hops."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.claim import Conclusion
from experiments.depth_dial.arms import ARMS, HOPS_PER_LOOP, TRAINED_HOPS
from experiments.heat_map import hops_by_loops
from openmythos.analysis.picture import (
    BAND,
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    figure_of,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "The same weights at other loops and on other walks"
SHOWN_HOPS, SHOWN_LOOPS = range(2, 17, 2), (*range(1, 9), 10, 12, 16)
NAMES = {
    "fixed_longest": "Trained at 4 loops, longest walks only: none to spare",
    "fixed_mixed": "Trained at 4 loops, mixed walks",
    "sampled_longest": "Trained at 2 to 8 loops, longest walks only",
    "sampled_mixed": "Trained at 2 to 8 loops, mixed walks",
}


def draw(conclusion: Conclusion) -> "Mapping[str, Figure]":
    """Every figure of the study."""
    data = conclusion.figures
    return {
        "stepping_and_holding": heat_maps(data["stepping_and_holding"], TITLE),
        "spare_from_one": heat_maps(data["spare_from_one"], "Spare loops from one source only"),
        "reach": reach(data["reach"]),
    }


def heat_maps(data: Mapping[str, Any], title: str) -> "Figure":
    """Accuracy by hops (rows) and loops (columns), a panel per arm."""
    shown = data["accuracy"]
    height = 2.75 * max(1, len(shown)) + 0.85
    with styled():
        figure = figure_of(5.6, height)
        panels = figure.subplots(max(1, len(shown)), squeeze=False).ravel()
        figure.subplots_adjust(0.095, 0.5 / height, 0.985, 1 - 1.05 / height, hspace=0.36)
        figure.text(0.02, 1 - 0.24 / height, title, weight="bold", size=11)
        said = (
            "Right answers in %, mean over seeds; chance 6. Below the line walks",
            "are longer than any in training. Framed: two hops per loop.",
        )
        for line, words in enumerate(said):
            figure.text(0.02, 1 - (0.45 + 0.18 * line) / height, words, color=MUTED, size=9)
        for axes, (arm, accuracy) in zip(panels, shown.items(), strict=False):
            rows = [data["hops"].index(h) for h in SHOWN_HOPS]
            columns = [data["loops"].index(n) for n in SHOWN_LOOPS if n in data["loops"]]
            values, loops = np.array(accuracy)[np.ix_(rows, columns)], data["loops"]
            own = [loops[column] for column in columns]
            hops_by_loops(axes, NAMES[arm], SHOWN_HOPS, own, values, HOPS_PER_LOOP)
            trained = sum(hops <= TRAINED_HOPS for hops in SHOWN_HOPS)
            axes.axhline(trained - 0.5, color=INK, linewidth=1.6)
    return figure


def reach(data: Mapping[str, Any]) -> "Figure":
    """Accuracy at the best loops by hops: looped arms, and what is changed about one of them."""
    groups: Sequence[tuple[str, tuple[str, ...]]] = (
        ("Depth and walks in training", tuple(NAMES)),
        (
            "Four loops, longest walks, and ...",
            ("fixed_longest", "every_loop", "on_the_way", "rope", "drawn_positions"),
        ),
        (
            "Four loops with rotary positions, and plain stacks",
            (
                "rope",
                "stack_training_rope",
                "stack_parameters_rope",
                "stack_training",
                "stack_test",
            ),
        ),
    )
    with styled():
        figure = figure_of(5.6, 11.4)
        panels = figure.subplots(3)
        figure.subplots_adjust(0.1, 0.045, 0.98, 0.97, hspace=0.28)
        for axes, (title, arms) in zip(panels, groups, strict=True):
            _curves(axes, data, [arm for arm in arms if arm in data["arms"]])
            axes.set_title(title)
            axes.set_ylabel("accuracy at the best loops")
        panels[-1].set_xlabel("hops")
    return figure


# The arms of a panel differ in colour, dash and marker.
LOOKS = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (INK, "-.", "^"), ("#3f8f5f", ":", "D"),
         ("#8a5fbf", "-", "v"))  # fmt: skip


def _curves(axes: "Axes", data: Mapping[str, Any], arms: Sequence[str]) -> None:
    hops = [h for h in data["hops"] if h >= 2]
    start = data["hops"].index(hops[0])
    axes.axvspan(hops[0], TRAINED_HOPS, color=BAND, zorder=0)
    axes.text(2.1, 1.04, "trained", ha="left", color=MUTED, size=8.5)
    for (colour, dash, marker), arm in zip(LOOKS[: len(arms)], arms, strict=True):
        mean, low, high = (values[start:] for values in data["arms"][arm])
        axes.fill_between(hops, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(hops, mean, color=colour, linestyle=dash, linewidth=1.6, marker=marker,
                  markersize=3.6, label=ARMS[arm].says)  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = [2, 4, 8, 10, 12, 16, 24, 32]
    axes.set_xticks(ticks, [str(h) for h in ticks])
    axes.minorticks_off()
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.axhline(1 / 16, color=GRID, linewidth=1)
    axes.set_ylim(-0.13 * len(arms), 1.12)  # the legend has the room below
    axes.legend(frameon=False, fontsize=8.5, loc="lower left", borderaxespad=0.1)
