"""Measures a model on held-out examples at a fixed number of loops."""

import math

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from openmythos.data.loader import TokenLoader
from openmythos.data.packing import IGNORED_TARGET, on_device
from openmythos.data.puzzle import Puzzle
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cross_entropy import cross_entropy
from openmythos.train.ranks import Ranks

Row = dict[str, float | int | str]  # one measurement, as it is written to metrics.jsonl


def held_out_bits_per_byte(
    model: RecurrentDepthLM,
    loader: TokenLoader,
    num_loops: int,
    max_batches: int | None = None,
    ranks: Ranks | None = None,
) -> float:
    """Bits per byte of the validation text at a fixed depth; see ``held_out_bits``.

    Over ranks, each measures its own rows, and the result is that of all.
    """
    documents = held_out_bits(model, loader, num_loops, max_batches)
    bits, sizes = sum(bits for bits, _ in documents), sum(size for _, size in documents)
    return _over_ranks(bits, sizes, ranks)


def _over_ranks(part: float, whole: float, ranks: Ranks | None) -> float:
    """The quotient of two sums over the ranks."""
    if ranks is not None and ranks.mesh is not None:
        sums = torch.tensor([part, whole], dtype=torch.float64, device=ranks.device)
        part, whole = ranks.sum_rows(sums).tolist()
    return part / whole


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
            places = loader.places(loader.rows(step))
            sizes = loader.tokenizer.token_num_bytes[batch.targets.numpy()[counted]]
            batch, ctx = on_device(model, batch)
            output = model(batch.tokens, num_loops=num_loops, ctx=ctx)
            nats = cross_entropy(output.logits, batch.targets).cpu().double().numpy()
            found.append((loader.document_of(places)[counted], nats[counted], sizes))
    numbers, nats, sizes = (np.concatenate(column) for column in zip(*found, strict=True))
    _, index = np.unique(numbers, return_inverse=True)
    bits = np.bincount(index, weights=nats) / math.log(2)
    return list(zip(bits.tolist(), np.bincount(index, weights=sizes).tolist(), strict=True))


def puzzle_accuracy(
    model: RecurrentDepthLM,
    puzzle: Puzzle,
    size: int,
    num_loops: int,
    count: int,
    seed: int,
    ranks: Ranks | None = None,
) -> float:
    """Share of held-out examples that are answered right; see ``puzzle_right``."""
    if ranks is None or ranks.mesh is None:
        return float(puzzle_right(model, puzzle, size, num_loops, count, seed).float().mean())
    rows = (ranks.row_rank, ranks.num_row_ranks)
    right = puzzle_right(model, puzzle, size, num_loops, count, seed, rows)
    return _over_ranks(float(right.sum()), float(len(right)), ranks)


def puzzle_right(
    model: RecurrentDepthLM,
    puzzle: Puzzle,
    size: int,
    num_loops: int,
    count: int,
    seed: int,
    rows: tuple[int, int] = (0, 1),
) -> Bool[Tensor, " B"]:
    """For each held-out example of a size: whether every token of its answer is the most likely.

    Greedy decoding gives the answer exactly where that is so. ``rows`` are the first and the step
    of the examples that are asked, of ``count``.
    """
    examples = puzzle.held_out_batch(size, count, seed).rows(rows[0], count, rows[1])
    batch, ctx = on_device(model, examples)
    first = puzzle.question_len(size) - 1  # where the answer's first token is predicted
    with inference(model):
        logits = model(batch.tokens, num_loops=num_loops, ctx=ctx).logits[:, first:]
    return (logits.argmax(dim=-1) == batch.targets[:, first:]).all(dim=-1)
