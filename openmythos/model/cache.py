"""The KV cache of all layers and loops, and the cache layouts.

A slot holds the keys and values of one layer of the prelude or coda, or of one layer and kept loop
of the core. The cache layout decides which loops are kept and which slot a loop reads. A
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
from openmythos.config.schema import as_integer, plain, require, require_positive

LoopT = TypeVar("LoopT", int, Tensor)
Stage = Literal["prelude", "core", "coda"]


class Place(NamedTuple):
    """Address of a layer's keys and values; outside the core, ``loop_idx`` is None."""

    stage: Stage
    layer: int
    loop_idx: Int[Tensor, "B"] | None


@dataclass(frozen=True)
class PerLoop:
    """Every loop keeps its own keys and values, so results are the same as without a cache."""

    exact = True
    always_writes = True

    def num_slots(self, num_loops: int) -> int:
        """Slots per core layer for ``num_loops`` loops."""
        return num_loops

    def slot(self, loop: LoopT) -> LoopT:
        """The slot that a row at this loop reads, for one loop or for a tensor of one per row."""
        return loop

    def writes(self, loop_idx: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """Whether each row stores its keys and values at its loop."""
        return torch.ones_like(loop_idx, dtype=torch.bool)


@dataclass(frozen=True)
class EveryK(PerLoop):
    """Loops 0, k, 2k ... are kept; a loop reads the last kept loop up to and including itself."""

    k: int
    exact = False
    always_writes = False

    def __post_init__(self) -> None:
        require_positive(self, "k")

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
    """One slot that every loop overwrites: later tokens read the last loop of earlier ones."""

    exact = False

    def num_slots(self, num_loops: int) -> int:
        """One."""
        return 1

    def slot(self, loop: LoopT) -> LoopT:
        """Always slot 0."""
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

    Each row fills its own columns from 0 on, one per token; ``lengths`` are the rows' numbers of
    tokens. At most ``max_loops`` loops may be run. If a token stops earlier, the keys and values of
    its last loop are copied to the later loops (``fill_forward``), because later tokens may run and
    read those. Gradients do not flow through the cache.
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
        require(isinstance(self.layout, PerLoop), "layout", layout, "a CacheLayout, as LastLoop()")
        batch_size = as_integer("batch_size", batch_size, 1)
        max_len, max_loops = (
            as_integer("max_len", max_len, 1),
            as_integer("max_loops", max_loops, 1),
        )
        if config.depth_attention is not None and not self.layout.exact:
            raise ValueError(
                f"cache layout {self.layout} loses loops that depth_attention reads; use per_loop"
            )
        self.max_loops, self.max_len = max_loops, max_len
        self.num_core_layers = config.num_core_layers
        self.core_start = config.num_prelude_layers
        self.coda_start = self.core_start + self.layout.num_slots(max_loops) * self.num_core_layers
        num_slots = self.coda_start + config.num_coda_layers
        # One more column is allocated than is used. Slices of the columns then have the same
        # strides when the cache is full, which would otherwise need another compiled graph.
        wide = max_len + 1
        self.tensors = tuple(
            torch.zeros(num_slots, batch_size, heads, wide, dim, dtype=dtype, device=device)[
                :, :, :, :max_len
            ]
            for heads, dim in config.attention.cache_shapes
        )
        self.lengths = [0] * batch_size
        self._ends = [0] * batch_size  # one past the columns that chunks may have written

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors of keys and values, whether filled or not."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def length(self) -> int:
        """Number of tokens of the longest row."""
        return max(self.lengths)

    def view(
        self,
        num_tokens: int,
        valid: Bool[Tensor, "B T"] | None = None,
        rows: Sequence[int] | None = None,
    ) -> "CacheView":
        """The next chunk of some rows; ``lengths`` grow only when the view is committed.

        Args:
            num_tokens: Length of the chunk, including padding.
            valid: True at real tokens, False at padding, which may be anywhere; None: no padding.
            rows: The cache's row of each row of the chunk; None: all rows in order.

        Raises:
            ValueError: A row has too few free columns, or ``valid`` has another number of rows.
        """
        given_rows = range(len(self.lengths)) if rows is None else plain(rows)
        chosen = [as_integer("a row of the cache", row) for row in given_rows]
        within = all(0 <= row < len(self.lengths) for row in chosen)
        if not within or len(set(chosen)) < len(chosen):
            allowed = f"different numbers in 0..{len(self.lengths) - 1}"
            raise ValueError(f"rows are {chosen}; they must be {allowed}")
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
        for row, length, count in zip(chosen, before, counts, strict=True):
            # What a failed forward has left may be NaN, and a weight of 0 times NaN is NaN.
            for tensor in self.tensors:
                tensor[:, row, :, length : self._ends[row]] = 0
            self._ends[row] = length + count
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
    """A chunk of tokens and the columns of the cache where its keys and values are stored.

    Attributes:
        cache: The memory.
        columns: Each token's column; it attends to the columns up to its own. Padding is not
            stored; its column only determines what it attends to.
        valid: True at real tokens; None: no padding.
        start: The first column, if all rows have the same columns and no padding; else None.
        stop: One past the last column of the longest row.
        rows: The cache's row of each row of the chunk; None: all rows in order.
        lengths: Per row of the chunk: the cache's row, its tokens before the chunk, its new tokens.
        loop: The loop of all rows, if it is the same and known on the host. Keys and values can
            then be read as a view of the cache instead of a copy.
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
        """The view of some rows of the chunk; commit the whole view, not this one."""
        return replace(
            self,
            columns=self.columns[index],
            valid=None if self.valid is None else self.valid[index],
            rows=index if self.rows is None else self.rows[index],
        )

    def check(self) -> None:
        """Refuse to overwrite what was read since this view was made; call it before ``store``.

        Raises:
            RuntimeError: Another chunk was committed since this view was made.
        """
        for row, before, _ in self.lengths:
            if self.cache.lengths[row] != before:
                now = self.cache.lengths[row]
                raise RuntimeError(
                    f"row {row} of the cache has {now} tokens and had {before} when this context "
                    "was made; make a context for each chunk"
                )

    def commit(self) -> None:
        """Add the chunk to the cache's ``lengths``, once all its keys and values are stored.

        Raises:
            RuntimeError: Another chunk was committed since this view was made.
        """
        self.check()
        lengths = list(self.cache.lengths)
        for row, before, count in self.lengths:
            lengths[row] = before + count
        self.cache.lengths = lengths  # in one assignment: all rows or none

    def mask(self, dtype: torch.dtype) -> Float[Tensor, "B 1 T S"] | None:
        """0 where a token attends to a column, else -inf; None if the causal order is enough."""
        num_tokens = self.columns.shape[1]
        if self.start is not None and (self.start == 0 or num_tokens == 1):
            return None
        hidden = torch.arange(self.stop, device=self.columns.device) > self.columns[..., None]
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill(hidden, float("-inf"))[:, None]

    def store(self, new: tuple[Tensor, ...], place: Place) -> tuple[Tensor, ...]:
        """Store the chunk's ``[B heads T dim]`` tensors; return all columns up to ``stop``."""
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
        """The chunk's tensors ``[R B heads T dim]`` from its last R loops, newest first.

        Needs the layout ``PerLoop``. Loops before the first are read as loop 0; mask them.
        """
        assert place.loop_idx is not None
        back = torch.arange(1, num_recent + 1, device=place.loop_idx.device)[:, None]
        loops = (place.loop_idx - back).clamp(min=0)
        slots = self.cache.core_start + loops * self.cache.num_core_layers + place.layer
        where = (slots[..., None], self._rows[:, None], slice(None), self.columns)
        return tuple(tensor[where].transpose(2, 3) for tensor in self.cache.tensors)

    def fill_forward(self, num_loops: Int[Tensor, "B"]) -> None:
        """Copy the keys and values of each row's last loop, ``num_loops - 1``, to later loops."""
        cache = self.cache
        source = cache.layout.slot(num_loops - 1)
        slots = torch.arange(1, cache.layout.num_slots(cache.max_loops), device=source.device)
        target = slots[:, None]
        shown = torch.minimum(target, source)  # slots that were written are copied to themselves
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
        """Row and index in the chunk of every real token."""
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
        """The columns up to ``stop``, as a view where possible."""
        if not isinstance(slot, Tensor):
            whole = tensor.select(0, slot)[:, :, : self.stop]
            return whole if self.rows is None else whole[self.rows]
        return tensor[slot, self._rows, :, : self.stop]

    def _chunk(self, tensor: Tensor, slot: int | Tensor) -> Float[Tensor, "B heads T dim"]:
        """The present contents of the chunk's columns."""
        slots = slot[:, None] if isinstance(slot, Tensor) else slot
        return tensor[slots, self._rows[:, None], :, self.columns].transpose(1, 2)

    def _write(self, tensor: Tensor, slot: int | Tensor, stored: Tensor) -> None:
        in_place = not isinstance(slot, Tensor) and not torch.compiler.is_compiling()
        if self.start is not None and self.rows is None and in_place:
            whole = tensor[slot]
            whole[:, :, self.start : self.start + stored.shape[2]] = stored
            return
        # One index per token: the compiler would copy the whole cache to write into a view of it.
        slots = slot if isinstance(slot, Tensor) else torch.full_like(self._rows, slot)
        if self.valid is None:
            where = (slots[:, None], self._rows[:, None], slice(None), self.columns)
            tensor[where] = stored.transpose(1, 2)
        else:
            rows, tokens = self._real
            where = (slots[rows], self._rows[rows], slice(None), self.columns[rows, tokens])
            tensor[where] = stored.transpose(1, 2)[rows, tokens]
