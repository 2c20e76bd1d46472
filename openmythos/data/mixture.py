"""Rows from several sources, each with its exact share of them.

The order of the sources repeats after a cycle of at most 10,000 rows. In every cycle a source of
weight w has exactly w times as many rows as the cycle, and after any number n of rows it had w n
rows, give or take less than one. So the source of a row, and how many of its rows came before, are
two look-ups in the tables of one cycle: a run resumes at any step without going through the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from openmythos.config.schema import in_words
from openmythos.data.file import Document
from openmythos.data.hashing import hash_bytes, split_keys, threshold
from openmythos.data.loader import TokenLoader, Windows
from openmythos.data.packing import Batch, pack_windows
from openmythos.data.source import read_source

CYCLE = 10_000


def rows_per_cycle(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers of rows, in lowest terms.

    Raises:
        ValueError: A weight is not a number above 0 with at most four decimals, or they do not sum
            to 1.
    """
    rows = []
    for weight in weights:
        given = weight if isinstance(weight, float | int) else math.nan
        if not 0 < given < math.inf:
            shown = repr(weight) if isinstance(weight, float | int) else in_words(weight)
            raise ValueError(f"a weight is {shown}; it must be above 0 and below 1")
        rows.append(round(given * CYCLE))
        if abs(rows[-1] - given * CYCLE) > 1e-6 or not rows[-1]:
            raise ValueError(
                f"a weight is {weight!r}; give at most four decimals (the shares are exact in "
                f"every {CYCLE:,} rows), such as {max(rows[-1], 1) / CYCLE}"
            )
    if sum(rows) != CYCLE:
        shown = " + ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"the weights are {shown} = {sum(rows) / CYCLE:g}; they must sum to 1")
    return [number // math.gcd(*rows) for number in rows]


def cycle_order(rows: Sequence[int]) -> Int[np.ndarray, " N"]:
    """Which source each row of a cycle is from, where source i has ``rows[i]`` of its rows.

    Of all beginnings of n rows of the N, source i has more than n rows[i] / N - 1 of them, and less
    than n rows[i] / N + 1. Each row goes to the source that may have one more, and is the first
    to need it.

    Source: Baruah, Cohen, Plaxton, Varvel, "Proportionate progress: a notion of fairness in
    resource allocation" (Algorithmica 1996): with the earliest deadline first, one machine is
    shared exactly.
    """
    total = sum(rows)
    given = [0] * len(rows)
    order = np.empty(total, dtype=np.int64)
    for row in range(total):
        _, chosen = min(
            (-(-(count + 1) * total // share), source)  # the row after which it would lag by one
            for source, (count, share) in enumerate(zip(given, rows, strict=True))
            if count * total < (row + 1) * share
        )
        given[chosen] += 1
        order[row] = chosen
    return order


class MixtureLoader:
    """Batches of rows of several loaders; like theirs, each depends on the step only.

    A source that is read to its end begins again, in a new order: every row of a source occurs
    once before any of it occurs twice.

    Args:
        loaders: One per source, with the same tokenizer, row length, batch size, seed and ranks.
        weights: The share of the rows of each.

    Raises:
        ValueError: The loaders differ, or the weights cannot be used; see ``rows_per_cycle``.
    """

    def __init__(self, loaders: Sequence[TokenLoader], weights: Sequence[float]) -> None:
        first = loaders[0]
        for other in loaders[1:]:
            if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise ValueError(
                    f"{first.data.folder} and {other.data.folder} were prepared with different "
                    f"tokenizers ({first.tokenizer.fingerprint[:12]}, "
                    f"{other.tokenizer.fingerprint[:12]}): prepare one with --tokenizer of the "
                    "other"
                )
            for name in ("seq_len", "batch_size", "seed", "rank", "world_size"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(f"the loaders of a mixture differ in {name}")
        self.loaders, self.weights = tuple(loaders), tuple(weights)
        self.tokenizer, self.batch_size = first.tokenizer, first.batch_size
        per_cycle = rows_per_cycle(weights)
        self._rows_per_cycle = np.array(per_cycle, dtype=np.int64)
        self._order = cycle_order(per_cycle)
        before = np.empty_like(self._order)  # rows of the same source, earlier in the cycle
        for source, count in enumerate(per_cycle):
            before[self._order == source] = np.arange(count)
        self._before = before

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that `batch` depends on except the ranks."""
        parts = [[loader.fingerprint for loader in self.loaders], self._rows_per_cycle.tolist()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step`, counted from 0."""
        sources, places = self.locate(self.loaders[0].rows(step))
        shape = (len(sources), self.loaders[0].seq_len + 1)
        rows = Windows(
            tokens=np.empty(shape, dtype=np.int64),
            starts=np.empty(shape, dtype=np.bool_),
            num_valid=np.empty(len(sources), dtype=np.int64),
            counted=np.empty(shape, dtype=np.bool_),
        )
        for source, loader in enumerate(self.loaders):
            own = np.flatnonzero(sources == source)
            if len(own):
                found = loader.read(loader.windows(places[own]))
                rows.tokens[own], rows.starts[own] = found.tokens, found.starts
                rows.num_valid[own], rows.counted[own] = found.num_valid, found.counted
        return pack_windows(
            *rows,
            pad_id=self.tokenizer.pad_id,
            token_num_bytes=self.tokenizer.token_num_bytes,
        )

    def locate(
        self, rows: Int[np.ndarray, " B"]
    ) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """The source of each row, numbered over all steps, and its place among that source's."""
        cycles, inside = np.divmod(rows, len(self._order))
        sources = self._order[inside]
        return sources, cycles * self._rows_per_cycle[sources] + self._before[inside]

    def in_words(self) -> list[str]:
        """A line per source: its share, what it holds, and how long it lasts."""
        lines = []
        for loader, weight in zip(self.loaders, self.weights, strict=True):
            steps = loader.num_windows / (weight * self.batch_size)
            lines.append(
                f"{weight:.2%} of the rows: {loader.data.settings.get('source', '')}: "
                f"{loader.data.summary()}; read once in {steps:,.1f} steps, then in a new order"
                + (f"; {cut}" if (cut := loader.cut_in_words()) else "")
            )
        return lines


def tokenizer_texts(
    sources: Sequence[tuple[str, str]],
    weights: Sequence[float],
    *,
    val_fraction: float,
    seed: int,
    max_bytes: int,
) -> Iterator[str]:
    """The beginnings of sources by their weights, without documents that will be held out.

    Args:
        sources: Each as `read_source` takes it: what it is, and the column of its text.
        weights: The share of ``max_bytes`` of each.
        val_fraction: As `prepare` takes it.
        seed: As `prepare` takes it.
        max_bytes: Bytes in all, about.
    """
    for (source, column), weight in zip(sources, weights, strict=True):
        left = weight * max_bytes
        for document in read_source(source, column):
            if isinstance(document, Document) and document.text:
                data = document.text.encode(errors="replace")
                key = split_keys(np.array([hash_bytes(data)], dtype=np.uint64), seed)
                if key[0] >= threshold(val_fraction):
                    left -= len(data)
                    yield data.decode()
            if left <= 0:
                break
