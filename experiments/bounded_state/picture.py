"""The two figures: norms over loops, and how trainings ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, INK, MUTED, ORANGE, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"lti": BLUE, "add": ORANGE, "linear": MUTED}


def draw_norms(curves: list[dict[str, Any]]) -> Figure:
    """Log norms over log loops; blue LTI by rho, orange addition, grey a free W_h."""
    figure = figure_of(6.4, 4.0)
    axes = figure.subplots()
    for curve in curves:
        if curve["kind"] not in COLOURS:
            continue
        points = [
            (loops, norm)
            for loops, norm in zip(curve["loops"], curve["norms"], strict=True)
            if norm is not None and norm < 1e9
        ]
        name = "addition" if curve["kind"] == "add" else f"{curve['kind']} {curve['rho']:g}"
        style = "--" if curve["kind"] == "linear" else "-"
        loops, norms = zip(*points, strict=True)
        axes.plot(loops, norms, style, color=COLOURS[curve["kind"]], linewidth=1.4)
        axes.annotate(
            name, (loops[-1], norms[-1]), xytext=(4, 0), textcoords="offset points",
            color=COLOURS[curve["kind"]], fontsize=7, va="center",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(right=30_000)
    axes.set_xlabel("loops")
    axes.set_title("Norm of the state, fixed weights: what rho decides")
    figure.tight_layout()
    return figure


def draw_outcomes(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy of trained models by injection, rate and loops; a cross where runs were lost."""
    figure = figure_of(6.4, 3.4)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    cells = sorted({(row["loops"], row["rate"]) for row in rows})
    for row in rows:
        x, y = cells.index((row["loops"], row["rate"])), kinds.index(row["kind"])
        value = row["accuracy"]
        shade = 0.0 if value is None else value
        axes.scatter(x, y, s=900, marker="s", color=BLUE, alpha=max(0.05, shade))
        lost = f"\n{row['lost']} lost" if row["lost"] else ""
        text = f"{'' if value is None else f'{value:.2f}'}{lost}"
        axes.annotate(text, (x, y), ha="center", va="center", fontsize=7, color=INK)
    axes.set_xticks(range(len(cells)), [f"{loops} loops\n{rate:g}" for loops, rate in cells])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.grid(visible=False)
    axes.set_title("Trained: accuracy by injection, loops and learning rate")
    figure.tight_layout()
    return figure
