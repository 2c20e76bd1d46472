"""Answers and base text by loops, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, INK, MUTED, ORANGE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {"before": (MUTED, "o:"), "fixed": (ORANGE, "s--"), "sampled": (BLUE, "o-")}


def draw(data: Mapping[str, Any]) -> Figure:
    """Panels of 1 to 4 hops and of base text; small marks are seeds."""
    hops = list(next(iter(data.values()))["right"]) if data else []
    with styled():
        figure = figure_of(7.6, 2.9)
        panels = figure.subplots(1, len(hops) + 1, squeeze=False)[0]
        figure.subplots_adjust(0.06, 0.18, 0.99, 0.82, wspace=0.28)
        for axes, number in zip(panels, hops, strict=False):
            for arm, own in data.items():
                _curve(axes, own["right"][number], arm, 100)
            axes.axhline(20, color=INK, linewidth=0.8, linestyle=(0, (1, 2.5)))
            axes.set_ylim(0, 104)
            axes.set_title(f"{number} hop{'s' * (number != '1')}: right, %")
        for arm, own in data.items():
            _curve(panels[-1], own["bits"], arm, 1)
        panels[-1].set_title("base text: bits")
        panels[0].legend(frameon=False, fontsize=8, loc="upper left")
        for axes in panels:
            axes.set_xlabel("loops")
    return figure


def _curve(axes: Any, curve: Mapping[str, list[float]], arm: str, times: float) -> None:
    colour, style = LOOKS[arm]
    loops = [int(n) for n in curve]
    means = [times * fmean(seeds) for seeds in curve.values()]
    axes.plot(loops, means, style, color=colour, markersize=3.5, linewidth=1.5, label=arm)
    for n, seeds in zip(loops, curve.values(), strict=True):
        axes.plot([n] * len(seeds), [times * v for v in seeds], ".", color=colour, markersize=2.5)
    axes.set_xticks(loops, [str(n) for n in loops])
