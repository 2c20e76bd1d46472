"""Right answers by what training had of the question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmythos.analysis.picture import BLUE, GRID, INK, MUTED, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(scores: dict[str, dict[str, list[float]]]) -> Figure:
    """Bars by kind of question: one per arm, with every seed as a dot."""
    with styled():
        figure = figure_of(6.4, 3.6)
        axes = figure.subplots()
        kinds = {
            "facts": "the facts",
            "trained": "trained walks",
            "same_facts": "others over\nthe same facts",
            "new_facts": "over facts that no\nsuch walk had",
        }
        looks = {
            "loop": ("2 layers, 4 times", BLUE),
            "shallow": ("2 layers", GRID),
            "deep": ("8 layers", MUTED),
        }
        for number, (arm, own) in enumerate(scores.items()):
            name, colour = looks[arm]
            places = [place + 0.26 * (number - 1) for place in range(len(kinds))]
            means = [sum(own[kind]) / max(1, len(own[kind])) for kind in kinds]
            axes.bar(places, means, width=0.24, color=colour, label=name)
            for place, kind in zip(places, kinds, strict=True):
                axes.plot([place] * len(own[kind]), own[kind], ".", color=INK, markersize=3)
        axes.set_xticks(range(len(kinds)), list(kinds.values()))
        axes.set_ylim(0, 1.18)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_title("Right answers, by what training had of the walk")
        if scores:
            axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper right")
        figure.tight_layout()
    return figure
