"""Batches from prepared data; the loader has no state but the step number.

`batch(step)` depends on the data, the seed and the step only. A run that stopped before
step s resumes with `batch(s)`, on any number of ranks, and sees the same batches as without a stop.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Shaped

from openmythos.data.hashing import permutation
from openmythos.data.index import SPLITS, read_index
from openmythos.data.packing import Batch, num_windows, pack_windows, whole_documents


class Windows(NamedTuple):
    """Spans of seq_len + 1 tokens of a stream, as `pack_windows` takes them."""

    tokens: Int[np.ndarray, "B T1"]
    starts: Bool[np.ndarray, "B T1"]
    num_valid: Int[np.ndarray, " B"]
    counted: Bool[np.ndarray, "B T1"]


Spans = tuple[Int[np.ndarray, " W"], Int[np.ndarray, " W"]]  # where each begins, and ends


class TokenLoader:
    """Reads one split of a prepared folder, memory-mapped.

    Every epoch goes through all windows once, in an order drawn from (seed, epoch). A batch may
    straddle two epochs. Rank r of n gets rows r, r + n, r + 2n ... of the global batch.

    Text is cut into windows without gaps. A window of conversations holds whole ones, in the order
    in which they are stored; of one that is longer than a row, the beginning (`num_cut`), unless
    none of that counts (`num_skipped`).

    Args:
        folder: Folder written by `openmythos.data.prepare.prepare`.
        split: "train" or "val".
        seq_len: Tokens per row.
        batch_size: Rows of the global batch, over all ranks; a multiple of `world_size`.
        seed: Seed of the order of the windows.
        rank: This process, from 0.
        world_size: Number of processes that share each batch.
        verify: Compare the SHA-256 of every shard (about 1 GB/s), besides its size.
        tokenizer_fingerprint: Fingerprint of the model's tokenizer; if given, the data must have
            been made with it.

    Raises:
        ValueError: An argument is out of range, the folder is not prepared data or is damaged, its
            tokenizer is not the expected one, the training split has fewer tokens than one row
            needs, or the validation split is empty.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = True,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        _check_arguments(split, seq_len, batch_size, rank, world_size)
        self.data = index = read_index(folder)
        self.tokenizer = index.load_tokenizer()
        if tokenizer_fingerprint not in (None, index.tokenizer_fingerprint):
            raise ValueError(
                f"tokenizer mismatch: {folder} was prepared with "
                f"{index.tokenizer_fingerprint[:12]}, the model uses "
                f"{tokenizer_fingerprint[:12]}; prepare it with the model's tokenizer"
            )
        index.check_files(split, checksums=verify)
        content = index.splits[split]
        self.split = split
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_tokens = content.num_tokens
        self.num_bytes = content.num_bytes
        offsets = np.memmap(index.folder / content.document_offsets.file, dtype="<i8", mode="r")
        self._document_starts = offsets[:-1]
        self.num_windows = num_windows(self.num_tokens, seq_len)
        if split == "train" and self.num_tokens < seq_len + 1 and not content.counted:
            raise ValueError(
                f"the train split of {folder} has {self.num_tokens} tokens, fewer than the "
                f"{seq_len + 1} of one row: lower seq_len, or prepare more text"
            )
        if not self.num_windows:  # a short validation split is one row, filled up with padding
            raise ValueError(
                f"the {split} split of {folder} has {self.num_tokens} tokens: prepare the data "
                f"again, with --val-fraction above 0"
            )
        dtype = np.dtype(index.dtype).newbyteorder("<")
        self._shards, self._counted = (
            [np.memmap(index.folder / file.file, dtype=kind, mode="r") for file in files]
            for files, kind in ((content.shards, dtype), (content.counted, np.dtype(np.bool_)))
        )
        self._shard_ends = np.cumsum([len(shard) for shard in self._shards])
        self._windows: Spans | None = None
        self.num_cut, self.num_skipped = 0, 0
        if content.counted:
            self._place_conversations(offsets)
        self._orders: dict[int, Int[np.ndarray, " W"]] = {}
        self._lock = Lock()  # of the orders, for threads that read ahead
        self._content = [file.sha256 for file in (*content.shards, *content.counted)]
        if (
            content.counted or self.tokenizer.bos_id == self.tokenizer.eos_id
        ):  # else the tokens imply the offsets
            self._content.append(content.document_offsets.sha256)

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps after which every window was seen; the last one may begin the next epoch."""
        return -(-self.num_windows // self.batch_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that `batch` depends on except the ranks.

        A checkpoint stores it, so that a resumed run can tell whether its data has changed.
        """
        parts = [self.tokenizer.fingerprint, self.split, self.seq_len, self.batch_size, self.seed]
        return hashlib.sha256(repr((parts, self._content)).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step`, counted from 0.

        Raises:
            ValueError: `step` is negative.
        """
        return self._pack(self.windows(self.rows(step)))

    def windows(self, places: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """The windows at these places of the endless order, which is shuffled in every epoch."""
        epochs, slots = np.divmod(places, self.num_windows)
        found = [
            self._epoch_order(epoch)[slot]
            for epoch, slot in zip(epochs.tolist(), slots.tolist(), strict=True)
        ]
        return np.array(found, dtype=np.int64)

    def validation_batches(self, max_batches: int | None = None) -> Iterator[Batch]:
        """This rank's rows of one pass over all windows, in the order of the text.

        The last batch is filled up with rows of padding, so that all batches have the same shape
        and all ranks get equally many. Therefore sum the losses over the targets that are not
        ignored; do not average over rows.

        Args:
            max_batches: Number of global batches to stop after; None reads the whole split.
        """
        num_batches = self.num_steps_per_epoch
        if max_batches is not None:
            num_batches = min(num_batches, max_batches)
        for step in range(num_batches):
            yield self._pack(self.rows(step))

    def rows(self, step: int) -> Int[np.ndarray, " B"]:
        """This rank's rows of the global batch of `step`, numbered over all steps.

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative: steps count from 0")
        first = step * self.batch_size
        return np.arange(first + self.rank, first + self.batch_size, self.world_size)

    def cut_in_words(self) -> str:
        """What of the conversations does not fit into rows; empty if everything does."""
        if not self.num_cut + self.num_skipped:
            return ""
        return (
            f"{self.num_cut:,} conversations are cut after {self.seq_len + 1:,} tokens, "
            f"{self.num_skipped:,} are left out because no answer begins before that"
        )

    def places(self, windows: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B T"]:
        """The place in the split of each target of these windows; past the end, of none."""
        starts = windows * self.seq_len
        if self._windows is not None:
            known = np.append(self._windows[0], self.num_tokens)
            starts = known[np.minimum(windows, self.num_windows)]
        return starts[:, None] + np.arange(
            1, self.seq_len + 1
        )  # a target is the token that follows

    def document(self, number: int) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """The tokens of a document of the split, from 0, and which of them count in the loss."""
        start = int(self._document_starts[number])
        is_last = number == len(self._document_starts) - 1
        stop = self.num_tokens if is_last else int(self._document_starts[number + 1])
        ids, counted = np.empty(stop - start, dtype=np.int64), np.ones(stop - start, dtype=np.bool_)
        self._read_into(ids, self._shards, start, stop)
        if self._counted:
            self._read_into(counted, self._counted, start, stop)
        counted[0] = False
        return ids, counted

    def document_of(self, positions: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """The number of the document, from 0, of the tokens at these places of the split."""
        return np.searchsorted(self._document_starts, positions, side="right") - 1

    def text(self) -> bytes:
        """The text of the split, one document after the other, `num_bytes` long."""
        return b"".join(self.tokenizer.decode_bytes(shard.tolist()) for shard in self._shards)

    def read(self, windows: Int[np.ndarray, " B"]) -> Windows:
        """The tokens of these windows; of one past the end, nothing."""
        spans = np.full((len(windows), self.seq_len + 1), self.tokenizer.pad_id, dtype=np.int64)
        starts = np.zeros(spans.shape, dtype=np.bool_)
        counted = np.ones(spans.shape, dtype=np.bool_)
        num_valid = np.zeros(len(windows), dtype=np.int64)
        for row, window in enumerate(windows.tolist()):
            start, stop = self._span(window)
            if start < stop:
                num_valid[row] = stop - start
                self._read_into(spans[row], self._shards, start, stop)
                if self._counted:
                    self._read_into(counted[row], self._counted, start, stop)
                first, last = np.searchsorted(self._document_starts, (start, stop))
                starts[row, self._document_starts[first:last] - start] = True
        return Windows(spans, starts, num_valid, counted)

    def _place_conversations(self, offsets: Int[np.ndarray, " N1"]) -> None:
        """Whole conversations in windows; of one that is too long, the beginning."""
        starts, stops = whole_documents(offsets, self.seq_len)
        is_cut = ~np.isin(stops, offsets)
        is_kept = np.ones(len(starts), dtype=np.bool_)
        for window in np.flatnonzero(is_cut).tolist():
            counted = np.zeros(stops[window] - starts[window], dtype=np.bool_)
            self._read_into(counted, self._counted, int(starts[window]), int(stops[window]))
            is_kept[window] = counted[1:].any()
        self._windows = starts[is_kept], stops[is_kept]
        self.num_windows = len(self._windows[0])
        self.num_cut, self.num_skipped = int((is_cut & is_kept).sum()), int((~is_kept).sum())
        if not self.num_windows and len(starts):
            raise ValueError(
                f"no conversation of {self.data.folder} has an answer within {self.seq_len} "
                f"tokens: raise seq_len"
            )

    def _span(self, window: int) -> tuple[int, int]:
        """Where a window begins and ends; past the last one it is empty."""
        if self._windows is None:
            start = window * self.seq_len
            return start, min(start + self.seq_len + 1, self.num_tokens)
        if window >= self.num_windows:
            return 0, 0
        return int(self._windows[0][window]), int(self._windows[1][window])

    def _epoch_order(self, epoch: int) -> Int[np.ndarray, " W"]:
        with self._lock:
            order = self._orders.get(epoch)
            if order is None:
                order = permutation(self.num_windows, self.seed, epoch)
                # Two orders are cached, for a batch that straddles two epochs. If the split is
                # smaller than a batch, one batch needs more of them, and they are drawn again:
                # slower, but with the same result.
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = order
            return order

    def _pack(self, windows: Int[np.ndarray, " B"]) -> Batch:
        return pack_windows(
            *self.read(windows),
            pad_id=self.tokenizer.pad_id,
            token_num_bytes=self.tokenizer.token_num_bytes,
        )

    def _read_into(
        self,
        span: Shaped[np.ndarray, " T1"],
        shards: Sequence[Shaped[np.ndarray, " N"]],
        start: int,
        stop: int,
    ) -> None:
        shard = int(np.searchsorted(self._shard_ends, start, side="right"))
        written = 0
        while start < stop:
            end = int(self._shard_ends[shard])
            begin = end - len(shards[shard])
            piece = shards[shard][start - begin : min(stop, end) - begin]
            span[written : written + len(piece)] = piece
            written += len(piece)
            start = end
            shard += 1


@runtime_checkable  # the tests check argument types
class StepLoader(Protocol):
    """Gives the batch of any step."""

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step`, counted from 0."""


def read_ahead(
    loader: StepLoader, start_step: int = 0, *, num_workers: int = 1
) -> Generator[Batch, None, None]:
    """`batch(start_step)`, `batch(start_step + 1)` ..., made by threads before they are needed.

    The batches and their order do not depend on the number of threads. Closing the generator ends
    the threads.

    Args:
        loader: Where the batches are from.
        start_step: The first step.
        num_workers: Threads, each two batches ahead; 0 makes each batch when it is asked for.
    """
    if not num_workers:
        yield from map(loader.batch, itertools.count(start_step))
    executor = ThreadPoolExecutor(max_workers=num_workers, thread_name_prefix="token-loader")
    pending: deque[Future[Batch]] = deque()
    try:
        for step in itertools.count(start_step):
            pending.append(executor.submit(loader.batch, step))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _check_arguments(split: str, seq_len: int, batch_size: int, rank: int, world_size: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rank={rank} of world_size={world_size} is out of range: ranks go from 0 to "
            f"world_size - 1"
        )
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {world_size} ranks: it is the "
            f"global number of rows, give a multiple of {world_size}"
        )
