"""Keys and values of all layers and loops, and which loop's a later token reads.

One slot is one (stage, layer) of the prelude or coda, or one (kept loop, layer) of the core.
Without a cache, ``RecentLoops`` has the few that a token reads of itself.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.config import ModelConfig

Stage = Literal["prelude", "core", "coda"]


@dataclass(frozen=True)
class PerLoop:
    """Every loop keeps its own keys and values: cached equals uncached exactly."""

    exact = True
    always_writes = True

    def num_slots(self, num_loops: int) -> int:
        """Slots that one core layer needs for ``num_loops`` loops."""
        return num_loops

    def slot(self, loop_idx: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """The slot that a row at this loop reads."""
        return loop_idx

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

    def slot(self, loop_idx: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """floor(loop / k)."""
        return loop_idx // self.k

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

    def slot(self, loop_idx: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Always the same."""
        return torch.zeros_like(loop_idx)


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

    All rows share the column in which a token is stored; ``valid`` marks the columns that hold a
    real token (left padding does not). ``max_loops`` is the deepest loop that may be run; a token
    that stops earlier is filled forward, so that deeper loops of later tokens never meet a hole.
    Gradients do not flow through a cache.
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
        self.tensors = tuple(
            torch.zeros(num_slots, batch_size, heads, max_len, dim, dtype=dtype, device=device)
            for heads, dim in config.attention.cache_shapes
        )
        self.valid = torch.zeros(batch_size, max_len, dtype=torch.bool, device=device)
        self.length = 0
        self.padded = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, filled or not."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def append(self, num_tokens: int, valid: Bool[Tensor, "B T"] | None = None) -> int:
        """Reserve the next columns for a chunk and return the first one.

        Raises:
            ValueError: The cache is full.
        """
        start = self.length
        if start + num_tokens > self.max_len:
            raise ValueError(
                f"{start} + {num_tokens} tokens do not fit a cache of max_len={self.max_len}"
            )
        self.valid[:, start : start + num_tokens] = True if valid is None else valid
        self.padded = self.padded or valid is not None
        self.length += num_tokens
        return start

    def update(
        self,
        new: tuple[Tensor, ...],
        *,
        stage: Stage,
        layer: int,
        loop_idx: Int[Tensor, "B"] | None,
        rows: Int[Tensor, "B"] | None,
        start: int,
    ) -> tuple[Tensor, ...]:
        """Store a chunk's ``[B heads T dim]`` tensors; return all columns up to its end."""
        stop = start + new[0].shape[2]
        if stage != "core":
            assert loop_idx is None
            slot = layer if stage == "prelude" else self.coda_start + layer
            return tuple(
                self._write_one(t[slot], n, rows, start)
                for t, n in zip(self.tensors, new, strict=True)
            )
        assert loop_idx is not None
        slots = self.core_start + self.layout.slot(loop_idx) * self.num_core_layers + layer
        where = torch.arange(len(loop_idx), device=loop_idx.device) if rows is None else rows
        result = []
        for tensor, fresh in zip(self.tensors, new, strict=True):
            stored = fresh.detach().to(tensor.dtype)
            if not self.layout.always_writes:
                old = tensor[slots, where, :, start:stop]
                stored = torch.where(self.layout.writes(loop_idx)[:, None, None, None], stored, old)
            tensor[slots, where, :, start:stop] = stored
            result.append(tensor[slots, where, :, :stop].to(fresh.dtype))
        return tuple(result)

    def earlier(
        self,
        num_recent: int,
        *,
        layer: int,
        loop_idx: Int[Tensor, "B"],
        rows: Int[Tensor, "B"] | None,
        start: int,
        stop: int,
    ) -> tuple[Tensor, ...]:
        """A chunk's ``[R B heads T dim]`` of its last loops, newest first, as ``PerLoop`` has them.

        Where a row has no such loop, loop 0 stands in.
        """
        back = torch.arange(1, num_recent + 1, device=loop_idx.device)[:, None]
        slots = self.core_start + (loop_idx - back).clamp(min=0) * self.num_core_layers + layer
        where = torch.arange(len(loop_idx), device=loop_idx.device) if rows is None else rows
        return tuple(tensor[slots, where, :, start:stop] for tensor in self.tensors)

    def _write_one(
        self, tensor: Tensor, fresh: Tensor, rows: Int[Tensor, "B"] | None, start: int
    ) -> Tensor:
        stop, stored = start + fresh.shape[2], fresh.detach().to(tensor.dtype)
        if rows is None:
            tensor[:, :, start:stop] = stored
            return tensor[:, :, :stop].to(fresh.dtype)
        tensor[rows, :, start:stop] = stored
        return tensor[rows, :, :stop].to(fresh.dtype)

    def fill_forward(
        self, rows: Int[Tensor, "N"], num_loops: Int[Tensor, "N"], start: int, stop: int
    ) -> None:
        """Show tokens that took ``num_loops`` to deeper loops as they were at their last."""
        source = self.layout.slot(num_loops - 1)
        target = torch.arange(1, self.layout.num_slots(self.max_loops), device=rows.device)[:, None]
        shown = torch.minimum(target, source)  # a slot that was written shows itself
        for layer in range(self.num_core_layers):
            old = self.core_start + shown * self.num_core_layers + layer
            new = self.core_start + target * self.num_core_layers + layer
            for tensor in self.tensors:
                tensor[new, rows, :, start:stop] = tensor[old, rows, :, start:stop]


class RecentLoops:
    """The last loops' keys and values of a forward without a cache, for ``depth_attention``.

    ``tensors[layer]`` are ``[R B heads T dim]``, newest loop first, zeros at the start. They are
    replaced and never written into, so gradients flow through them.
    """

    def __init__(self, config: ModelConfig, tokens: Int[Tensor, "B T"], dtype: torch.dtype) -> None:
        (num_rows, num_tokens), num_recent = tokens.shape, config.num_recent_loops
        empty = tuple(
            torch.zeros(
                num_recent, num_rows, heads, num_tokens, dim, dtype=dtype, device=tokens.device
            )
            for heads, dim in config.attention.cache_shapes
        )
        self.tensors = [empty] * config.num_core_layers

    def exchange(
        self, new: tuple[Tensor, ...], *, layer: int, rows: Int[Tensor, "B"] | None
    ) -> tuple[Tensor, ...]:
        """Return the loops before, and keep the ``[B heads T dim]`` tensors of this one."""
        stored = self.tensors[layer]
        earlier = stored if rows is None else tuple(tensor[:, rows] for tensor in stored)
        kept = tuple(
            torch.cat((fresh[None].to(old.dtype), old[:-1]))
            for fresh, old in zip(new, earlier, strict=True)
        )
        if rows is not None:
            pairs = zip(stored, kept, strict=True)
            kept = tuple(whole.index_copy(1, rows, part) for whole, part in pairs)
        self.tensors[layer] = kept
        return earlier
