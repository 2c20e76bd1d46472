"""The figures of experiment 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.text_loops import curve
from openmythos.analysis.picture import (
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

NAMES = {
    "loop": "looped",
    "loop_moe": "looped, with experts",
    "stack_parameters": "plain, equal parameters",
    "stack_training_flops": "plain, equal training FLOPs",
    "stack_test_flops": "plain, equal test FLOPs",
}


def bits_by_loops(data: Mapping[str, Any]) -> Figure:
    """Held-out loss over loops with its seeds and both laws, the plain stacks as lines."""
    with styled():
        figure = figure_of(7.6, 4.0)
        wide, near = figure.subplots(1, 2, width_ratios=(1.25, 1))
        figure.subplots_adjust(0.085, 0.24, 0.985, 0.91, wspace=0.26)
        for arm, colour in (("loop", BLUE), ("loop_moe", ORANGE)):
            loops, bits = _points(data["loops"][arm])
            wide.plot(loops, bits, color=colour, marker="o", markersize=3.5, label=NAMES[arm])
        styles: Sequence[Any] = ("-", (0, (4, 2)), (0, (1, 1.5)))
        for (arm, height), dashes in zip(data["stacks"].items(), styles, strict=True):
            if height is not None:
                style: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": dashes}
                wide.axhline(height, label=NAMES[arm], **style)
        figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=8.5)
        wide.set_xscale("log", base=2)
        wide.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        wide.set_title("Held-out bits per byte")
        wide.set_xlabel(f"loops at the test (trained around {data['trained']})")
        _laws(near, data)
    return figure


def _laws(axes: Axes, data: Mapping[str, Any]) -> None:
    """Up to twice the trained depth: every seed and the fits to their mean."""
    most = 2 * data["trained"]
    for seed in data["seeds"]:
        loops, bits = _points(seed, most)
        axes.plot(loops, bits, color=BLUE, alpha=0.25, linewidth=1)
    loops, bits = _points(data["loops"]["loop"], most)
    if len(loops) < 4:
        return
    axes.plot(loops, bits, "o", color=BLUE, markersize=4, zorder=4)
    fine = np.linspace(1, most, 200)
    for law, colour, dashes in ((curve.exponential, INK, "-"), (curve.power, ORANGE, "--")):
        heights = curve.values(law, curve.fit(law, loops, bits), fine)
        axes.plot(fine, heights, dashes, color=colour, linewidth=1.4, label=law.__name__)
    axes.legend(frameon=False, fontsize=8.5)
    axes.set_title("Two laws, fitted")
    axes.set_xlabel("loops")


def surprisal(data: Mapping[str, Any]) -> Figure:
    """Loops taken and bits gained, by fifths of the tokens."""
    with styled():
        figure = figure_of(6.4, 2.9)
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(0.06, 0.17, 0.985, 0.88, wspace=0.32)
        titles = ("Loops that the rule takes", "Gain from 1 to 4 loops")
        panels[1].set_ylabel("bits per token")
        for axes, name, title in zip(panels, ("loops", "bits_gained"), titles, strict=True):
            places = range(1, 1 + len(data[name]))
            axes.bar(places, data[name], color=BLUE, width=0.62)
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.set_title(title)
            axes.set_xlabel("fifths of the tokens, easy to hard")
            axes.set_xticks(list(places))
    return figure


def experts(data: Mapping[str, Any]) -> Figure:
    """How far the experts of two loops agree: one token, and two tokens."""
    with styled():
        figure = figure_of(6.8, 3.3)
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(0.07, 0.13, 0.99, 0.87, wspace=0.16)
        titles = ("The same token", "Two different tokens")
        names = ("jaccard", "other_jaccard")
        for axes, name, title in zip(panels, names, titles, strict=True):
            axes.grid(visible=False)
            axes.set_title(title)
            if data[name]:
                _agreement(axes, np.array(data[name]))
        panels[0].set_ylabel("loop")
    return figure


def _agreement(axes: Axes, shares: np.ndarray) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("agreement", ["#ffffff", BLUE])
    places = np.arange(len(shares))
    axes.imshow(shares, cmap=shades, vmin=0, vmax=1)
    axes.set_xticks(places, [str(n + 1) for n in places])
    axes.set_yticks(places, [str(n + 1) for n in places])
    axes.set_xlabel("loop")
    axes.tick_params(length=0)
    for row in places:
        for column in places:
            share = shares[row, column]
            axes.text(
                column, row, f"{share:.2f}".removeprefix("0"), ha="center", va="center",
                fontsize=6.5, color=INK if share < 0.6 else "white",
            )  # fmt: skip
    for side in axes.spines.values():
        side.set_color(GRID)


def _points(
    curve_of: Mapping[str, float], most: int | None = None
) -> tuple[list[int], list[float]]:
    found = sorted((int(loops), bits) for loops, bits in curve_of.items())
    kept = [(loops, bits) for loops, bits in found if most is None or loops <= most]
    return [loops for loops, _ in kept], [bits for _, bits in kept]
