"""The pictures: accuracy over hops at equal FLOPs, and what a silent loop would say on the way."""

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.chain_of_thought.arm import SUMS, TRAINED_HOPS, WALKS
from openmythos.analysis.picture import BLUE, INK, MUTED, ORANGE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(data: Mapping[str, Any]) -> "dict[str, Figure]":
    """A picture for each figure's data."""
    return {
        "right_by_hops": _right_by_hops(data["right_by_hops"]),
        "named_by_loop": _named_by_loop(data["named_by_loop"]),
    }


def _right_by_hops(data: Mapping[str, Any]) -> "Figure":
    hops, words = data["hops"], ("silent loop", "written, stack", "written, loop")
    with styled():
        figure = figure_of(4.6, 6.4)
        panels = figure.subplots(2, 1)
        figure.subplots_adjust(0.1, 0.18, 0.97, 0.95, hspace=0.42)
        for axes, arms, title in zip(panels, (WALKS, SUMS), ("Walks", "Sums"), strict=True):
            for arm, word, colour in zip(arms, words, (BLUE, ORANGE, INK), strict=False):
                curves = data["arms"].get(arm.name, {})
                for how, style in (("best", "o-"), ("equal", "o--")):
                    if how in curves:
                        label = f"{word}, equal FLOPs" if how == "equal" else word
                        means = [100 * fmean(seeds) for seeds in curves[how]]
                        axes.plot(hops, means, style, color=colour, markersize=3.5, label=label)
            axes.axvline(max(TRAINED_HOPS) + 0.5, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            axes.axhline(100 / 16, color=MUTED, linewidth=1)
            axes.text(1, 100 / 16 + 2, "chance", color=MUTED, fontsize=7, ha="left")
            axes.set_title(f"{title}: right answers, %; trained up to {max(TRAINED_HOPS)}")
            axes.set_xlabel("hops" if title == "Walks" else "numbers to add")
            axes.set_ylim(0, 104)
            axes.set_xticks([1, 4, 8, 12, 16])
        # Below, because the curves of a silent loop are everywhere.
        names = panels[0].get_legend_handles_labels()
        figure.legend(*names, frameon=False, loc="lower center", ncols=2, handlelength=3.5)
    return figure


def _named_by_loop(rows: list[list[float]]) -> "Figure":
    with styled():
        figure = figure_of(4.6, 3.4)
        axes = figure.subplots()
        figure.subplots_adjust(0.12, 0.16, 0.97, 0.84)
        if rows:
            axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_xticks(range(len(rows[0])), [str(n + 1) for n in range(len(rows[0]))])
            axes.set_yticks(range(len(rows)), [str(n + 1) for n in range(len(rows))])
            for loop, row in enumerate(rows):
                for place, share in enumerate(row):
                    colour = "white" if share > 0.6 else INK
                    axes.text(
                        place, loop, f"{100 * share:.0f}", ha="center", va="center",
                        color=colour, fontsize=8,
                    )  # fmt: skip
        axes.grid(visible=False)
        axes.set_title(
            "Silent loop, 8 hops: % of walks whose readout\nafter a loop names an entity"
        )
        axes.set_xlabel("entity after so many hops")
        axes.set_ylabel("loop")
    return figure
