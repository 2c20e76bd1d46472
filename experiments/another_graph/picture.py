"""Heat maps of hops against loops, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.another_graph.verdicts import BEFORE, HOPS_PER_LOOP, SAYS, SHOWN_HOPS
from experiments.heat_map import hops_by_loops
from openmythos.analysis.picture import figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {BEFORE: "Right answers in %: before, on its own graph"} | {
    arm: f"on another graph, {says}" for arm, says in SAYS.items()
}


def draw(data: Mapping[str, Any]) -> Figure:
    """A panel per arm, below each other; framed: two hops per loop."""
    height = 1.75 * max(1, len(data)) + 0.2
    with styled():
        figure = figure_of(5.6, height)
        panels = figure.subplots(max(1, len(data)), squeeze=False).ravel()
        figure.subplots_adjust(0.1, 0.42 / height, 0.985, 1 - 0.3 / height, hspace=0.62)
        for axes, (arm, one) in zip(panels, data.items(), strict=False):
            values = np.array(one["accuracy"])
            hops_by_loops(axes, TITLES[arm], SHOWN_HOPS, one["loops"], values, HOPS_PER_LOOP)
    return figure
