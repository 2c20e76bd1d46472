"""Expert load of the demo's act 1 with a mixture of experts in the core, by loops.

Trains with bias balancing and without, then counts the experts chosen on held-out text at every
loop. 0 is perfect balance; experts - 1 is collapse onto one.

    python -m benchmarks.balance --seconds 120
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from openmythos.config.schema import apply_overrides
from openmythos.data.loader import TokenLoader
from openmythos.data.packing import on_device
from openmythos.demo.text import text_config
from openmythos.model.feedforward import MoE, max_violation
from openmythos.model.loop import start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.display import TrainDisplay
from openmythos.train.run import set_up
from openmythos.train.task import TextTask

NUM_LOOPS = 8
EXPERTS = (
    "model.core_feed_forward.kind=moe",
    "model.core_feed_forward.num_experts=8",
    "model.core_feed_forward.num_experts_per_token=2",
    "model.core_feed_forward.d_expert=160",
    "model.core_feed_forward.bias_loops=4",  # the mean depth; deeper loops share the last row
)


@torch.no_grad()
def held_out_load(model: RecurrentDepthLM, loader: TokenLoader, max_batches: int) -> list[float]:
    """Max load / mean load - 1 of every loop, on held-out text."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    counts = torch.zeros(NUM_LOOPS, len(layers), layers[0].config.num_experts)
    assert model.training, "the layers count their load in training mode only"
    for batch in loader.validation_batches(max_batches):
        batch, ctx = on_device(model, batch)
        e = model.encode(batch.tokens, ctx)
        state = start_loops(model, e, ctx, [NUM_LOOPS] * len(e))
        for layer in layers:
            layer.load.zero_()
        for loop, _ in enumerate(unroll(model, state, ctx)):
            counts[loop] += torch.stack([layer.load.sum(dim=0) for layer in layers])
            for layer in layers:
                layer.load.zero_()
    return max_violation(counts).amax(dim=1).tolist()


def main() -> None:
    """Train twice and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        for rate in (0.01, 0.0):
            changes = [*EXPERTS, f"train.balance_rate={rate}"]
            config = apply_overrides(text_config(options.seed, options.seconds), changes)
            run = set_up(config, Path(folder) / f"rate-{rate}")
            with TrainDisplay(console, f"balance rate {rate}") as display:
                run.train(display)
            assert isinstance(run.task, TextTask)
            found[rate] = held_out_load(run.model, run.task.validation, max_batches=16)
    if options.json:
        print(json.dumps(found))
        return
    table = Table(title=f"max load / mean load - 1 after {options.seconds:.0f} s, by loop")
    table.add_column("balance rate")
    for loop in range(1, NUM_LOOPS + 1):
        table.add_column(str(loop), justify="right")
    for rate, violations in found.items():
        table.add_row(str(rate), *(f"{value:.2f}" for value in violations))
    Console().print(table)


if __name__ == "__main__":
    main()
