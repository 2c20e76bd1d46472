"""Draws figures of ``docs/concepts`` that no experiment draws: ``python -m docs.concept_figures``.

They are computed from the presets and the package's own schedules; nothing is trained.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import openmythos as om
from openmythos.analysis.picture import BLUE, INK, MUTED, ORANGE, figure_of, save, styled
from openmythos.config.counts import count
from openmythos.config.feed_forward import MoEConfig
from openmythos.train.depth_schedule import (
    ClippedPoissonDepth,
    FixedDepth,
    LogNormalPoissonDepth,
    UniformDepth,
)

FOLDER = Path(__file__).parent / "concepts"
DRAWS = 100_000


def panels(titles: Sequence[str], columns: int) -> tuple[Any, Sequence[Any]]:
    """Panels with titles, in rows."""
    rows = -(-len(titles) // columns)
    figure = figure_of(3.1 * columns, 2.5 * rows)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(len(titles))]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
    return figure, axes


def depth_in_training() -> Any:
    """How often each number of loops is drawn, by four schedules of mean 4."""
    schedules = {
        "fixed": FixedDepth(mean_recurrence=4),
        "clipped Poisson": ClippedPoissonDepth(mean_recurrence=4, low=2, high=8),
        "uniform": UniformDepth(low=2, high=6),
        "log-normal Poisson": LogNormalPoissonDepth(mean_recurrence=3),
    }
    figure, axes = panels(tuple(schedules), columns=2)
    for panel, schedule in zip(axes, schedules.values(), strict=True):
        generator = torch.Generator().manual_seed(0)
        drawn = schedule.draw(float(schedule.mean_recurrence), DRAWS, generator)
        shares = torch.bincount(drawn, minlength=13)[:13] / DRAWS
        panel.bar(range(1, 13), shares[1:].tolist(), color=BLUE)
        panel.set_xticks(range(2, 13, 2))
        panel.set_xlabel("loops of a step")
        panel.set_ylim(0, 0.4 if len(drawn.unique()) > 1 else 1.05)
    for panel in axes[::2]:
        panel.set_ylabel("share of steps", color=MUTED)
    return figure


def experts_read() -> Any:
    """The share of a layer's experts that one loop reads, by tokens at once, for mythos-1b."""
    experts = om.preset("mythos-1b").core_feed_forward
    assert isinstance(experts, MoEConfig)
    chosen, total = experts.num_experts_per_token, experts.num_experts
    figure, (read, used) = panels(("Weights read by a loop", "Weights used by a token"), columns=2)
    tokens = [2**power for power in range(11)]
    read.plot(tokens, [1 - (1 - chosen / total) ** n for n in tokens], color=BLUE)
    read.set_xlabel("tokens at once")
    read.set_ylabel("share of a layer's experts", color=MUTED)
    used.plot(tokens, [chosen / total for _ in tokens], color=ORANGE)
    for panel in (read, used):
        panel.set_xscale("log", base=2)
        panel.set_xticks(tokens[::2], [str(number) for number in tokens[::2]])
        panel.set_ylim(0, 1.05)
    used.set_xlabel("tokens at once")
    return figure


def counting() -> Any:
    """FLOPs and cache of parcae-770m by loops, beside the plain model of nearly twice its size."""
    looped, plain = om.preset("parcae-770m"), om.preset("parcae-gpt-1.3b")
    loops = list(range(1, 17))
    counts = [count(looped, num_loops=number, context_length=2048) for number in loops]
    beside = count(plain, context_length=2048)
    figure, axes = panels(
        ("Parameters, billions", "GFLOPs per token", "Cache, KiB per token"), columns=2
    )
    curves = [
        ([each.total_params / 1e9 for each in counts], beside.total_params / 1e9),
        ([each.inference_flops_per_token / 1e9 for each in counts], None),
        ([each.kv_bytes_per_token / 1024 for each in counts], beside.kv_bytes_per_token / 1024),
    ]
    curves[1] = (curves[1][0], beside.inference_flops_per_token / 1e9)
    for panel, (values, other) in zip(axes, curves, strict=True):
        panel.plot(loops, values, color=BLUE, label="parcae-770m, looped")
        panel.axhline(other, color=INK, linestyle=(0, (4, 3)), label="parcae-gpt-1.3b, plain")
        panel.set_ylim(0, 1.1 * max(*values, other or 0.0))
        panel.set_xticks((1, 4, 8, 12, 16))
        panel.set_xlabel("loops")
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, loc="center", bbox_to_anchor=(0.76, 0.3))
    return figure


FIGURES: dict[str, Callable[[], Any]] = {
    "depth-in-training.png": depth_in_training,
    "moe.png": experts_read,
    "counting.png": counting,
}


def main() -> None:
    """Draw all of them."""
    for name, draw in FIGURES.items():
        with styled():
            figure = draw()
            figure.tight_layout()
        save(figure, FOLDER / name)


if __name__ == "__main__":
    main()
