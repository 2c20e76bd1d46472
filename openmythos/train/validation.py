"""Measures a model on held-out examples at a fixed number of loops."""

import math

from openmythos.data.loader import TokenLoader
from openmythos.data.packing import on_device
from openmythos.data.synthetic import Walks
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cross_entropy import cross_entropy

Row = dict[str, float | int | str]  # one measurement, as it is written to metrics.jsonl


def held_out_bits_per_byte(
    model: RecurrentDepthLM, loader: TokenLoader, num_loops: int, max_batches: int | None = None
) -> float:
    """Bits per byte of the validation text at a fixed depth.

    Every token of the split counts once; ``max_batches`` limits the split to its first batches.
    """
    nats, num_bytes = 0.0, 0
    with inference(model):
        for batch in loader.validation_batches(max_batches):
            batch, ctx = on_device(model, batch)
            output = model(batch.tokens, num_loops=num_loops, ctx=ctx)
            nats += float(cross_entropy(output.logits, batch.targets).sum())
            num_bytes += batch.num_bytes
    return nats / math.log(2) / num_bytes


def hops_accuracy(
    model: RecurrentDepthLM, walks: Walks, num_hops: int, num_loops: int, size: int, seed: int
) -> float:
    """Share of held-out walks of ``num_hops`` hops whose target is the most likely token."""
    batch = walks.held_out_batch(num_hops, size, seed).to(model.embed.weight.device)
    with inference(model):
        logits = model(batch.tokens, num_loops=num_loops).logits[:, -1]
    return float((logits.argmax(dim=-1) == batch.targets[:, -1]).float().mean())
