"""The pictures: depth against cost, loops by hops, rules beside learnt halting, overthinking."""

import textwrap
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.halting.arm import ACT_ARMS, ARMS, MOST_LOOPS, PONDERNET, TRAINED_HOPS
from openmythos.analysis.picture import BLUE, INK, MUTED, ORANGE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"fixed": BLUE, "variable": ORANGE}
MARKS = {
    "entropy_kl": "o",
    "kl": "s",
    "latent_difference": "^",
    "acceleration": "v",
    "argmax_stable": "D",
}


def draw(data: Mapping[str, Any]) -> "dict[str, Figure]":
    """A picture for each figure's data."""
    return {
        "depth_by_cost": _depth_by_cost(data["depth_by_cost"]),
        "loops_by_hops": _loops_by_hops(data["loops_by_hops"]),
        "rules_and_depths": _rules_and_depths(data["rules_and_depths"]),
        "overthinking": _overthinking(data["overthinking"]),
    }


def _depth_by_cost(data: Mapping[str, Any]) -> "Figure":
    with styled():
        figure = figure_of(7.6, 3.4)
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(0.07, 0.17, 0.98, 0.86, wspace=0.2)
        for axes, key, factor in ((left, "loops", 1), (right, "right", 100)):
            for depth, points in data.items():
                ran = [(place, point[key]) for place, point in enumerate(points) if point[key]]
                if not ran:
                    continue
                places = [place for place, _ in ran]
                means = [factor * fmean(seeds) for _, seeds in ran]
                axes.plot(places, means, "o-", color=COLOURS[depth], label=f"{depth} depth")
                for place, seeds in ran:
                    every = [factor * value for value in seeds]
                    axes.plot([place] * len(every), every, "_", color=INK, markersize=9)
            costs = [point["cost"] for point in next(iter(data.values()))]
            axes.set_xticks(range(len(costs)), [f"{cost:g}" for cost in costs])
            axes.set_xlim(-0.3, len(costs) - 0.7)
            axes.set_xlabel("ponder cost per loop, nats")
        left.set_title("Loops taken, walks of 1 to 8 hops")
        left.set_ylim(0, MOST_LOOPS + 0.4)
        if left.lines:
            left.legend(frameon=False, loc="lower left")
        left.axhline(MOST_LOOPS, color=MUTED, linewidth=1)
        right.set_title("Right answers, %")
        right.set_ylim(0, 104)
    return figure


def _loops_by_hops(data: Mapping[str, Any]) -> "Figure":
    hops, styles = data["hops"], ("-", "--", "-.", ":")
    with styled():
        figure = figure_of(7.6, 3.6)
        panels = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(0.07, 0.16, 0.98, 0.88, wspace=0.08)
        for axes, (depth, arms) in zip(panels, ACT_ARMS.items(), strict=True):
            for arm, style in zip(arms, styles, strict=True):
                if arm.name in data["loops"]:
                    axes.plot(
                        hops, data["loops"][arm.name], style, color=COLOURS[depth],
                        label=f"cost {arm.cost:g}" if arm.cost else "no cost",
                    )  # fmt: skip
            other = "pondernet" if depth == "fixed" else "act_variable_shallow"
            if other in data["loops"]:
                words = "PonderNet" if depth == "fixed" else "no cost, begins at two"
                axes.plot(hops, data["loops"][other], "-", color=MUTED, linewidth=1.2, label=words)
            axes.set_title(f"{depth.capitalize()} depth")
            axes.set_xlabel("hops of the walk")
            axes.set_ylim(0, MOST_LOOPS + 0.4)
            if axes.lines:
                axes.legend(
                    loc="lower right", fontsize=8, bbox_to_anchor=(1.0, 0.12), handlelength=3.2,
                    labelspacing=0.25, framealpha=1, edgecolor="white",
                )  # fmt: skip
            _past_training(axes)
            axes.axhline(MOST_LOOPS, color=MUTED, linewidth=1)
        panels[0].set_ylabel("loops taken by the answer")
    return figure


def _past_training(axes: "Axes") -> None:
    last = max(TRAINED_HOPS) + 0.5
    axes.axvline(last, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate("not trained", (last + 0.1, 0.2), color=MUTED, fontsize=8)


def _rules_and_depths(data: Mapping[str, Any]) -> "Figure":
    with styled():
        figure = figure_of(7.6, 4.0)
        axes = figure.subplots()
        figure.subplots_adjust(0.08, 0.14, 0.7, 0.89)
        depths = range(1, len(data["fixed"]) + 1)
        axes.plot(depths, [100 * x for x in data["fixed"]], "-", color=MUTED, label="fixed depth")
        for kind, points in data["rules"].items():
            loops, right = zip(*points, strict=True)
            axes.plot(
                loops, [100 * x for x in right], MARKS[kind], color=INK, markersize=5,
                fillstyle="none", label=kind.replace("_", " "),
            )  # fmt: skip
        groups = {f"ACT, {depth} depth, by cost": arms for depth, arms in ACT_ARMS.items()}
        for (label, arms), colour in zip(groups.items(), COLOURS.values(), strict=True):
            found = [data["heads"][arm.name] for arm in arms if arm.name in data["heads"]]
            places = [loops for loops, _ in found], [100 * right for _, right in found]
            axes.plot(*places, "*--", color=colour, markersize=9, linewidth=0.8, label=label)
        if PONDERNET.name in data["heads"]:
            loops, right = data["heads"][PONDERNET.name]
            axes.plot(loops, 100 * right, "P", color=BLUE, markersize=7, label="PonderNet")
        axes.set_xlabel("mean loops of the answer, walks of 1 to 8 hops")
        axes.set_ylim(0, 104)
        axes.set_title("Right answers, %: exit rules after training, and learnt halting")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return figure


def _overthinking(data: Mapping[str, Any]) -> "Figure":
    with styled():
        figure = figure_of(7.6, 3.0)
        panels = figure.subplots(1, max(1, len(data)), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(0.06, 0.18, 0.98, 0.68, wspace=0.1)
        figure.text(0.02, 0.93, "Right answers when all walks take so many loops", weight="bold")
        figure.text(0.02, 0.87, "White: none is right; dark blue: all are.", color=MUTED, size=9)
        for axes, (name, rows) in zip(panels, data.items(), strict=False):
            axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
            axes.grid(visible=False)
            places = [loops - 1 for loops in (1, 4, 8, 12, 16)]
            axes.set_xticks(places, [str(place + 1) for place in places])
            axes.set_yticks(range(0, len(rows), 2), [str(n + 1) for n in range(0, len(rows), 2)])
            axes.set_title(textwrap.fill(ARMS[name].in_words, 20), fontsize=8)
            axes.set_xlabel("loops allowed")
        panels[0].set_ylabel("hops")
    return figure
