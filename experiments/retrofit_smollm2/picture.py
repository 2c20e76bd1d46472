"""The one picture: held-out loss by loops, before and after, and the loss during training."""

from pathlib import Path
from typing import Any

from openmythos.analysis.picture import BLUE, DPI, INK, MUTED, ORANGE, save, styled


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture of ``results.json``."""
    from matplotlib.figure import Figure

    before, after = (found[stage]["bits_per_byte"] for stage in ("before", "after"))
    loops, run = [int(n) for n in before], found["training"]
    with styled():
        figure = Figure(figsize=(8.4, 3.4), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        places = range(len(loops))
        for scores, colour, name in ((before, MUTED, "retrofitted"), (after, BLUE, "trained")):
            values = [scores[str(n)] for n in loops]
            left.plot(places, values, "o-", color=colour, markersize=5)
            for place, value in zip(places, values, strict=True):
                left.annotate(
                    f"{value:.3f}", (place, value), (0, 7), textcoords="offset points",
                    ha="center", color=colour, fontsize=8.5,
                )  # fmt: skip
            left.annotate(
                name, (len(loops) - 1, values[-1]), (0, -15), textcoords="offset points",
                ha="right", color=colour,
            )  # fmt: skip
        values = [*before.values(), *after.values()]
        room = max(0.02, 0.5 * (max(values) - min(values)))
        left.set_ylim(min(values) - room, max(values) + room)
        left.set_xlim(-0.35, len(loops) - 0.65)
        left.set_xticks(list(places), [str(n) for n in loops])
        left.set_xlabel("loops of the core")
        left.set_title("Held-out bits per byte")
        colours = {1: MUTED, 2: BLUE}
        steps = range(1, len(run["loops"]) + 1)
        for depth in sorted(set(run["loops"])):
            chosen = [i for i, n in enumerate(run["loops"]) if n == depth]
            right.plot(
                [steps[i] for i in chosen],
                [run["nats_per_token"][i] for i in chosen],
                "o", markersize=4.5, color=colours.get(depth, ORANGE if depth == 4 else INK),
                label=f"{depth:.0f}",
            )  # fmt: skip
        right.set_xlabel("step of 512 tokens")
        right.set_title("Training loss, nats per token, by loops drawn")
        right.legend(
            ncols=4, frameon=False, loc="upper right", handletextpad=0.1, columnspacing=0.8
        )
        low, high = min(run["nats_per_token"]), max(run["nats_per_token"])
        right.set_ylim(low - 0.1, high + 0.25 * (high - low))
    save(figure, path)
