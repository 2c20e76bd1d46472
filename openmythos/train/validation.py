"""Measures a model on held-out examples at a fixed number of loops."""

import math

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from openmythos.data.loader import TokenLoader
from openmythos.data.packing import IGNORED_TARGET, on_device
from openmythos.data.synthetic import Walks
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cross_entropy import cross_entropy

Row = dict[str, float | int | str]  # one measurement, as it is written to metrics.jsonl


def held_out_bits_per_byte(
    model: RecurrentDepthLM, loader: TokenLoader, num_loops: int, max_batches: int | None = None
) -> float:
    """Bits per byte of the validation text at a fixed depth; see ``held_out_bits``."""
    documents = held_out_bits(model, loader, num_loops, max_batches)
    return sum(bits for bits, _ in documents) / sum(size for _, size in documents)


def held_out_bits(
    model: RecurrentDepthLM, loader: TokenLoader, num_loops: int, max_batches: int | None = None
) -> list[tuple[float, float]]:
    """Bits and bytes of each document of the validation text at a fixed depth.

    Every token of the split counts once; ``max_batches`` limits the split to its first batches.
    """
    found: list[tuple[np.ndarray, ...]] = []
    with inference(model):
        for step, batch in enumerate(loader.validation_batches(max_batches)):
            counted = (batch.targets != IGNORED_TARGET).numpy()
            rows = loader.rows(step)[:, None] * loader.seq_len
            places = rows + np.arange(1, loader.seq_len + 1)  # a target is the token that follows
            sizes = loader.tokenizer.token_num_bytes[batch.targets.numpy()[counted]]
            batch, ctx = on_device(model, batch)
            output = model(batch.tokens, num_loops=num_loops, ctx=ctx)
            nats = cross_entropy(output.logits, batch.targets).cpu().double().numpy()
            found.append((loader.document_of(places)[counted], nats[counted], sizes))
    numbers, nats, sizes = (np.concatenate(column) for column in zip(*found, strict=True))
    _, index = np.unique(numbers, return_inverse=True)
    bits = np.bincount(index, weights=nats) / math.log(2)
    return list(zip(bits.tolist(), np.bincount(index, weights=sizes).tolist(), strict=True))


def hops_accuracy(
    model: RecurrentDepthLM, walks: Walks, num_hops: int, num_loops: int, size: int, seed: int
) -> float:
    """Share of held-out walks that are answered right; see ``hops_right``."""
    right = hops_right(model, walks, num_hops, num_loops, size, seed)
    return float(right.float().mean())


def hops_right(
    model: RecurrentDepthLM, walks: Walks, num_hops: int, num_loops: int, size: int, seed: int
) -> Bool[Tensor, " B"]:
    """For each held-out walk of ``num_hops`` hops: whether its target is the most likely token.

    Of a walk that is written out, every target must be: the model then writes the same by itself,
    because each token that it reads is the one it would have written.
    """
    batch, ctx = on_device(model, walks.held_out_batch(num_hops, size, seed))
    with inference(model):
        most_likely = model(batch.tokens, num_loops=num_loops, ctx=ctx).logits.argmax(dim=-1)
    return ((most_likely == batch.targets) | (batch.targets == IGNORED_TARGET)).all(dim=1)
