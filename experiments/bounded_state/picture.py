"""The two figures: norms over loops, and how trainings ended."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from openmythos.analysis.picture import BLUE, INK, MUTED, ORANGE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"lti": BLUE, "add": ORANGE, "linear": MUTED}
MOST_SHOWN, APART = 1e8, 0.32  # of a norm; between labels, in powers of ten


@styled()
def draw_norms(curves: list[dict[str, Any]]) -> Figure:
    """Log norms over log loops; blue LTI by rho, orange addition, grey a free W_h past 1."""
    figure = figure_of(6.4, 4.0)
    axes = figure.subplots()
    ends = []
    for curve in curves:
        free = curve["kind"] == "linear"
        if curve["kind"] not in COLOURS or (free and curve["rho"] <= 1):
            continue
        pairs = zip(curve["loops"], curve["norms"], strict=True)
        points = [(loops, norm) for loops, norm in pairs if norm is not None and norm < MOST_SHOWN]
        loops, norms = zip(*points, strict=True)
        colour = COLOURS[curve["kind"]]
        axes.plot(loops, norms, "--" if free else "-", color=colour, linewidth=1.4)
        names = {"add": "plain addition", "linear": "a free matrix"}
        rho = "" if curve["rho"] is None else f" {curve['rho']:g}"
        name = names.get(curve["kind"], "LTI") + rho
        ends.append((math.log10(norms[-1]), loops[-1], name, colour))
    lowest = -math.inf
    for height, loops_shown, name, colour in sorted(ends):
        place = max(height, lowest + APART)
        lowest = place
        axes.annotate(
            name, (loops_shown, 10**place), xytext=(5, 0), textcoords="offset points",
            color=colour, fontsize=8, va="center",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(right=40_000)
    axes.set_xlabel("loops")
    axes.set_ylabel("largest norm of a token's state")
    axes.set_title("Norm of the state at fixed weights, by rho")
    figure.tight_layout()
    return figure


@styled()
def draw_outcomes(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy of trained models by injection, rate and loops; a cross where runs were lost."""
    figure = figure_of(6.4, 3.4)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    cells = sorted({(row["loops"], row["rate"]) for row in rows})
    for row in rows:
        x, y = cells.index((row["loops"], row["rate"])), kinds.index(row["kind"])
        value = row["accuracy"]
        shade = 0.0 if value is None else 0.9 * value
        corners = [x - 0.48, x + 0.48, x + 0.48, x - 0.48], [y - 0.46, y - 0.46, y + 0.46, y + 0.46]
        axes.fill(*corners, color=BLUE, alpha=max(0.05, shade), linewidth=0)
        lost = f"{row['lost']} of {row['runs']} lost" if row["lost"] else ""
        text = "\n".join(part for part in ("" if value is None else f"{value:.2f}", lost) if part)
        axes.annotate(text, (x, y), ha="center", va="center", fontsize=7, color=INK)
    axes.set_xticks(range(len(cells)), [f"{loops} loops\n{rate:g}" for loops, rate in cells])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.grid(visible=False)
    axes.set_title("Trained: accuracy by injection, loops and learning rate")
    figure.tight_layout()
    return figure
