"""Keys and values of all layers and loops, and which loop's a later token reads.

One slot is one (stage, layer) of the prelude or coda, or one (kept loop, layer) of the core. A
``KVCache`` is the memory; a ``CacheView`` is the chunk of tokens that one forward adds to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.config import ModelConfig

LoopT = TypeVar("LoopT", int, Tensor)
Stage = Literal["prelude", "core", "coda"]


class Place(NamedTuple):
    """Which layer's keys and values; ``loop_idx`` is each row's loop in the core, else None."""

    stage: Stage
    layer: int
    loop_idx: Int[Tensor, "B"] | None


@dataclass(frozen=True)
class PerLoop:
    """Every loop keeps its own keys and values: cached equals uncached exactly."""

    exact = True
    always_writes = True

    def num_slots(self, num_loops: int) -> int:
        """Slots that one core layer needs for ``num_loops`` loops."""
        return num_loops

    def slot(self, loop: LoopT) -> LoopT:
        """The slot that a row at this loop reads; of a number or of one per row."""
        return loop

    def writes(self, loop_idx: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """Whether a row at this loop stores its keys and values."""
        return torch.ones_like(loop_idx, dtype=torch.bool)


@dataclass(frozen=True)
class EveryK(PerLoop):
    """Loops 0, k, 2k ... are kept; a loop reads the newest kept loop not after it."""

    k: int
    exact = False
    always_writes = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1")

    def num_slots(self, num_loops: int) -> int:
        """ceil(num_loops / k)."""
        return -(-num_loops // self.k)

    def slot(self, loop: LoopT) -> LoopT:
        """floor(loop / k)."""
        return loop // self.k

    def writes(self, loop_idx: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """At multiples of k."""
        return loop_idx % self.k == 0


@dataclass(frozen=True)
class LastLoop(PerLoop):
    """One slot, overwritten by every loop: earlier tokens show their last loop."""

    exact = False

    def num_slots(self, num_loops: int) -> int:
        """One."""
        return 1

    def slot(self, loop: LoopT) -> LoopT:
        """Always the same."""
        return loop * 0


@dataclass(frozen=True)
class FirstLoop(LastLoop):
    """One slot, written by the first loop only."""

    always_writes = False

    def writes(self, loop_idx: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """At loop 0."""
        return loop_idx == 0


CacheLayout = PerLoop


class KVCache:
    """Preallocated keys and values of a batch.

    Each row fills its own columns from 0 on, one per token: ``lengths`` are the tokens that every
    row has. ``max_loops`` is the deepest loop that may be run; a token that stops earlier is filled
    forward, so that deeper loops of later tokens never meet a hole. Gradients do not flow through
    a cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_len: int,
        max_loops: int,
        layout: CacheLayout | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = PerLoop() if layout is None else layout
        if config.depth_attention is not None and not self.layout.exact:
            raise ValueError(
                f"cache layout {self.layout} loses loops that depth_attention reads; use PerLoop()"
            )
        self.max_loops, self.max_len = max_loops, max_len
        self.num_core_layers = config.num_core_layers
        self.core_start = config.num_prelude_layers
        self.coda_start = self.core_start + self.layout.num_slots(max_loops) * self.num_core_layers
        num_slots = self.coda_start + config.num_coda_layers
        # One column more than is used: the columns of a full cache are then strided as all others
        # are, and need no compiled graph of their own.
        wide = max_len + 1
        self.tensors = tuple(
            torch.zeros(num_slots, batch_size, heads, wide, dim, dtype=dtype, device=device)[
                :, :, :, :max_len
            ]
            for heads, dim in config.attention.cache_shapes
        )
        self.lengths = [0] * batch_size

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, filled or not."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def view(
        self,
        num_tokens: int,
        valid: Bool[Tensor, "B T"] | None = None,
        rows: Sequence[int] | None = None,
    ) -> "CacheView":
        """The next chunk of some rows. The cache goes on counting when the view is committed.

        Args:
            num_tokens: Of the chunk, with its padding.
            valid: True at real tokens, which may stand anywhere in the chunk; None: all are real.
            rows: The cache's rows that the chunk has, in its order; None: all of them.

        Raises:
            ValueError: A row of the cache is full, or there are not as many rows.
        """
        chosen = list(range(len(self.lengths))) if rows is None else list(rows)
        given = len(chosen) if valid is None else valid.shape[0]
        if given != len(chosen):
            raise ValueError(f"{given} rows given to a cache made for {len(chosen)}")
        device = self.tensors[0].device
        if valid is not None and bool(valid.all()):
            valid = None
        before = [self.lengths[row] for row in chosen]
        counts = [num_tokens] * len(chosen) if valid is None else valid.sum(dim=1).tolist()
        for row, length, count in zip(chosen, before, counts, strict=True):
            if length + count > self.max_len:
                raise ValueError(
                    f"{length} + {count} tokens of row {row} do not fit a cache of "
                    f"max_len={self.max_len}"
                )
        first = torch.tensor(before, device=device)[:, None]
        if valid is None:
            columns = first + torch.arange(num_tokens, device=device)
        else:
            columns = (first + valid.cumsum(dim=1) - 1).clamp(min=0)
        together = valid is None and len(set(before)) == 1
        return CacheView(
            cache=self,
            columns=columns,
            valid=valid,
            start=before[0] if together else None,
            stop=max(1, *(a + b for a, b in zip(before, counts, strict=True))),
            rows=None if rows is None else torch.tensor(chosen, device=device),
            lengths=tuple(zip(chosen, before, counts, strict=True)),
        )


@dataclass(frozen=True)
class CacheView:
    """A chunk of tokens and where its keys and values go.

    Attributes:
        cache: The memory.
        columns: Of every token of the chunk; a token sees the columns up to its own. That of
            padding says only what it sees: it is never stored.
        valid: True at real tokens; None: all are real.
        start: The first column, if all rows have the same columns and no padding; else None.
        stop: The first column after those of the longest row.
        rows: The cache's rows of this chunk; None: all.
        lengths: The cache's row, its tokens before the chunk and its new tokens, of each row.
        loop: The loop that all rows are at, where that is known on the host. The keys of a loop
            can then be read where they lie, without a copy.
    """

    cache: KVCache
    columns: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    start: int | None
    stop: int
    rows: Int[Tensor, "B"] | None
    lengths: tuple[tuple[int, int, int], ...]
    loop: int | None = None

    def select(self, index: Int[Tensor, "N"]) -> "CacheView":
        """Some rows of the chunk. What the whole commits has to hold for them too."""
        return replace(
            self,
            columns=self.columns[index],
            valid=None if self.valid is None else self.valid[index],
            rows=index if self.rows is None else self.rows[index],
        )

    def commit(self) -> None:
        """Count the chunk's tokens as read; call it when all their keys and values are stored.

        Raises:
            RuntimeError: The cache has gone on since the view was made.
        """
        for row, before, _ in self.lengths:
            if self.cache.lengths[row] != before:
                now = self.cache.lengths[row]
                raise RuntimeError(
                    f"row {row} of the cache has {now} tokens and had {before} when this context "
                    "was made; make a context for each chunk"
                )
        for row, before, count in self.lengths:
            self.cache.lengths[row] = before + count

    def mask(self, dtype: torch.dtype) -> Float[Tensor, "B 1 T S"] | None:
        """0 where a token sees a column and -inf elsewhere; None where causal order says it all."""
        num_tokens = self.columns.shape[1]
        if self.start is not None and (self.start == 0 or num_tokens == 1):
            return None
        hidden = torch.arange(self.stop, device=self.columns.device) > self.columns[..., None]
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill(hidden, float("-inf"))[:, None]

    def store(self, new: tuple[Tensor, ...], place: Place) -> tuple[Tensor, ...]:
        """Keep a chunk's ``[B heads T dim]`` tensors; return all columns up to its end."""
        slot = self._slot(place)
        writes = None
        if place.loop_idx is not None and not self.cache.layout.always_writes:
            writes = self.cache.layout.writes(place.loop_idx)[:, None, None, None]
        for tensor, fresh in zip(self.cache.tensors, new, strict=True):
            stored = fresh.detach().to(tensor.dtype)
            if writes is not None:
                stored = torch.where(writes, stored, self._chunk(tensor, slot))
            self._write(tensor, slot, stored)
        return tuple(
            self._prefix(tensor, slot).to(fresh.dtype)
            for tensor, fresh in zip(self.cache.tensors, new, strict=True)
        )

    def earlier(self, place: Place, num_recent: int) -> tuple[Tensor, ...]:
        """The chunk's ``[R B heads T dim]`` of its last loops, newest first; needs ``PerLoop``.

        Where a row has no such loop, loop 0 stands in.
        """
        assert place.loop_idx is not None
        back = torch.arange(1, num_recent + 1, device=place.loop_idx.device)[:, None]
        loops = (place.loop_idx - back).clamp(min=0)
        slots = self.cache.core_start + loops * self.cache.num_core_layers + place.layer
        where = (slots[..., None], self._rows[:, None], slice(None), self.columns)
        return tuple(tensor[where].transpose(2, 3) for tensor in self.cache.tensors)

    def fill_forward(self, num_loops: Int[Tensor, "B"]) -> None:
        """Show the chunk's tokens, which took ``num_loops``, to deeper loops as at their last."""
        cache = self.cache
        source = cache.layout.slot(num_loops - 1)
        slots = torch.arange(1, cache.layout.num_slots(cache.max_loops), device=source.device)
        target = slots[:, None]
        shown = torch.minimum(target, source)  # a slot that was written shows itself
        rows, tokens = self._real
        where = (self._rows[rows], slice(None), self.columns[rows, tokens])
        for layer in range(cache.num_core_layers):
            old = cache.core_start + shown[:, rows] * cache.num_core_layers + layer
            new = cache.core_start + target * cache.num_core_layers + layer
            for tensor in cache.tensors:
                tensor[new, *where] = tensor[old, *where]

    @property  # not cached: the compiler cannot follow the lock of cached_property
    def _rows(self) -> Int[Tensor, "B"]:
        if self.rows is not None:
            return self.rows
        return torch.arange(len(self.columns), device=self.columns.device)

    @cached_property
    def _real(self) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
        """Row and place in the chunk of every real token."""
        if self.valid is not None:
            rows, tokens = self.valid.nonzero(as_tuple=True)
            return rows, tokens
        (num_rows, num_tokens), device = self.columns.shape, self.columns.device
        rows = torch.arange(num_rows, device=device).repeat_interleave(num_tokens)
        return rows, torch.arange(num_tokens, device=device).repeat(num_rows)

    def _slot(self, place: Place) -> int | Int[Tensor, "B"]:
        """One slot for all rows, or one per row."""
        if place.stage == "prelude":
            return place.layer
        if place.stage == "coda":
            return self.cache.coda_start + place.layer
        first, width = self.cache.core_start + place.layer, self.cache.num_core_layers
        if self.loop is not None:
            return first + self.cache.layout.slot(self.loop) * width
        assert place.loop_idx is not None
        return first + self.cache.layout.slot(place.loop_idx) * width

    def _prefix(self, tensor: Tensor, slot: int | Tensor) -> Float[Tensor, "B heads S dim"]:
        """The columns that the chunk can see; a view where that is possible."""
        if not isinstance(slot, Tensor):
            whole = tensor.select(0, slot)[:, :, : self.stop]
            return whole if self.rows is None else whole[self.rows]
        return tensor[slot, self._rows, :, : self.stop]

    def _chunk(self, tensor: Tensor, slot: int | Tensor) -> Float[Tensor, "B heads T dim"]:
        """What stands in the chunk's columns."""
        slots = slot[:, None] if isinstance(slot, Tensor) else slot
        return tensor[slots, self._rows[:, None], :, self.columns].transpose(1, 2)

    def _write(self, tensor: Tensor, slot: int | Tensor, stored: Tensor) -> None:
        together = self.start is not None and self.rows is None and not isinstance(slot, Tensor)
        if together and not torch.compiler.is_compiling():
            whole = tensor.select(0, slot)
            whole[:, :, self.start : self.start + stored.shape[2]] = stored
        elif self.valid is None:
            # All indices are tensors: the compiler would copy the whole cache to write to a view.
            slots = slot[:, None] if isinstance(slot, Tensor) else torch.full_like(self.columns, slot)
            tensor[slots, self._rows[:, None], :, self.columns] = stored.transpose(1, 2)
        else:
            rows, tokens = self._real
            slots = slot[rows] if isinstance(slot, Tensor) else slot
            values = stored.transpose(1, 2)[rows, tokens]
            tensor[slots, self._rows[rows], :, self.columns[rows, tokens]] = values
