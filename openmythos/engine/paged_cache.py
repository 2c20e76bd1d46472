"""The KV cache in pages, and the context in which a model reads and writes it.

One flat pool per cached tensor, ``[num_slots * num_pages, page, heads, dim]``: slot s of page p is
entry ``s * num_pages + p``. Slots (a layer, or a layer and kept loop of the core) therefore become
numbers in a table, and the attention kernels know nothing of layers and loops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.config import ModelConfig
from openmythos.config.counts import kv_bytes_per_token
from openmythos.config.schema import as_integer
from openmythos.engine.page_pool import SCRATCH, PagePool
from openmythos.model.cache import CacheLayout, CacheView, PerLoop, Place
from openmythos.model.context import ForwardContext, KeysValues, Own, Recent
from openmythos.model.rope import rope_angles
from openmythos.ops.cpu.paged import beats_gather, takes
from openmythos.ops.paged import fill_pages, gather_pages, paged_attention


class PagedCache:
    """Keys and values of up to ``max_loops`` loops in ``num_pages`` pages; ``pages`` counts them.

    As in ``KVCache``, a token that stops early shows the keys and values of its last loop at later
    loops, which ``fill_forward`` copies.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        max_loops: int,
        layout: CacheLayout | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch_invariant: bool = False,
    ) -> None:
        self.layout = PerLoop() if layout is None else layout
        if config.depth_attention is not None and not self.layout.exact:
            raise ValueError(
                f"cache layout {self.layout} loses loops that depth_attention reads; use PerLoop()"
            )
        self.num_pages = as_integer("num_pages", num_pages, 2)  # one is for scratch
        self.page_size = as_integer("page_size", page_size, 1)
        self.max_loops = as_integer("max_loops", max_loops, 1)
        self.pages = PagePool(self.num_pages, self.page_size)
        self.num_core_layers = config.num_core_layers
        self.core_start = config.num_prelude_layers
        self.coda_start = self.core_start + self.layout.num_slots(max_loops) * self.num_core_layers
        self.num_slots = self.coda_start + config.num_coda_layers
        shape = self.num_slots * self.num_pages, self.page_size
        self.pools = tuple(
            torch.zeros(*shape, heads, dim, dtype=dtype, device=device)
            for heads, dim in config.attention.cache_shapes
        )
        heads = config.attention.num_heads
        # Gathering would pad every row to the longest that there can be.
        self.native = takes(self.pools) if batch_invariant else beats_gather(self.pools, heads)
        self._dtype, self._rope = dtype, None
        if config.rope is not None:
            positions = torch.arange(config.max_seq_len, device=device)[None]
            angles = rope_angles(positions, config.attention.rope_dim, config.rope, dtype)
            self._rope = tuple(angle[0] for angle in angles)

    @staticmethod
    def page_bytes(
        config: ModelConfig, page_size: int, max_loops: int, layout: CacheLayout, dtype: torch.dtype
    ) -> int:
        """Bytes of one page."""
        kept = layout.num_slots(max_loops)
        token = kv_bytes_per_token(
            config, num_loops=max_loops, kept_loops=kept, dtype_bytes=dtype.itemsize
        )
        return page_size * token

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copy the content of pages, given as (from, to), in all slots."""
        old, new = (list(numbers) for numbers in zip(*pages, strict=True))
        for pool in self.pools:
            slots = pool.view(self.num_slots, self.num_pages, *pool.shape[1:])
            slots[:, new] = slots[:, old]

    def fill_forward(self, tokens: Sequence[tuple[int, int, int, int]]) -> None:
        """Show the last loop of tokens at the later ones: copy what the core's layers stored.

        Args:
            tokens: Of each its page, its place in the page, the loops that it took, and the loops
                that later tokens of its text take at most, at which the copy ends.
        """
        pages, places, loops, depths = torch.tensor(tokens).unbind(1)
        slots, last = self.layout.slot(loops - 1), self.layout.slot(depths - 1)
        given = torch.stack((pages, places, slots, last), dim=1)
        sizes = self.core_start, self.num_core_layers, self.num_pages
        for pool in self.pools:
            fill_pages(pool, given, *sizes, native=self.native)

    def context(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        table: Int[Tensor, "B M"],
        seeds: Int[Tensor, "B 1"],
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> "PagedContext":
        """The context of a chunk of each row.

        Args:
            tokens: The chunk's tokens.
            positions: Where they stand in the row's text, from 0.
            table: The row's pages in the order of the text, up to the chunk's last token; padding
                with any page number.
            seeds: Of random initial states.
            valid: False at padding, which is stored nowhere.
        """
        page = table.gather(1, positions // self.page_size)
        if valid is not None:
            page = torch.where(valid, page, SCRATCH)
        view = PagedView(
            cache=self,
            columns=positions,
            valid=valid,
            start=None,
            stop=table.shape[1] * self.page_size,
            rows=None,
            lengths=(),
            table=table,
            page=page,
            offset=positions % self.page_size,
            length=positions.amax(dim=1) + 1,
        )
        rope = None
        if self._rope is not None:
            cos, sin = self._rope
            rope = cos[positions], sin[positions]
        return PagedContext(
            tokens, positions, rope, self._dtype, seeds, valid=valid, lengths=None, cache=view
        )


@dataclass(frozen=True)
class PagedView(CacheView):
    """A chunk of tokens and the pages that it reads and writes.

    Attributes:
        table: Each row's pages.
        page: Each token's page, ``SCRATCH`` for padding.
        offset: Each token's place in its page.
        length: Number of tokens that each row's last token attends to.
    """

    cache: PagedCache  # type: ignore[assignment]  # the same arithmetic of slots, other memory
    table: Int[Tensor, "B M"] = field(kw_only=True)
    page: Int[Tensor, "B T"] = field(kw_only=True)
    offset: Int[Tensor, "B T"] = field(kw_only=True)
    length: Int[Tensor, "B"] = field(kw_only=True)

    def select(self, index: Int[Tensor, "N"]) -> "PagedView":
        """See ``CacheView.select``."""
        return replace(
            self,
            columns=self.columns[index],
            valid=None if self.valid is None else self.valid[index],
            table=self.table[index],
            page=self.page[index],
            offset=self.offset[index],
            length=self.length[index],
        )

    def write(self, new: tuple[Tensor, ...], place: Place) -> Int[Tensor, "B M"]:
        """Store the chunk's ``[B heads T dim]`` tensors; return the rows' tables for this place."""
        slot = self._slot(place)
        column = slot[:, None] if isinstance(slot, Tensor) else slot
        entry = column * self.cache.num_pages + self.page
        if place.loop_idx is not None and not self.cache.layout.always_writes:
            writes = self.cache.layout.writes(place.loop_idx)[:, None]
            entry = torch.where(writes, entry, SCRATCH)
        for pool, fresh in zip(self.cache.pools, new, strict=True):
            pool[entry, self.offset] = fresh.detach().to(pool.dtype).transpose(1, 2)
        return column * self.cache.num_pages + self.table

    def store(self, new: tuple[Tensor, ...], place: Place) -> tuple[Tensor, ...]:
        """Store the chunk's ``[B heads T dim]`` tensors; return all tokens up to the chunk's."""
        table = self.write(new, place)
        return tuple(
            gather_pages(pool, table, self.length).to(fresh.dtype)
            for pool, fresh in zip(self.cache.pools, new, strict=True)
        )

    def earlier(self, place: Place, num_recent: int) -> tuple[Tensor, ...]:
        """See ``CacheView.earlier``."""
        assert place.loop_idx is not None
        back = torch.arange(1, num_recent + 1, device=place.loop_idx.device)[:, None]
        loops = (place.loop_idx - back).clamp(min=0)
        slots = self.cache.core_start + loops * self.cache.num_core_layers + place.layer
        entry = slots[..., None] * self.cache.num_pages + self.page
        return tuple(pool[entry, self.offset].transpose(2, 3) for pool in self.cache.pools)


@dataclass(frozen=True)
class PagedContext(ForwardContext):
    """The context of rows whose keys and values are in pages.

    A single token per row attends to the pages by their own kernel; a chunk of several gathers
    them first.
    """

    cache: PagedView | None = None

    def at_loop(self, loop: int | None, recent: Recent | None) -> "PagedContext":
        """The same for every loop: the tables tell the loops of the rows apart."""
        return self

    def store(self, new: tuple[Tensor, ...], place: Place) -> Any:
        """See ``ForwardContext.store``."""
        assert self.cache is not None
        if self.tokens.shape[1] > 1:
            return KeysValues(self, self.cache.store(new, place))
        return PagedKeysValues(self.cache, self.cache.write(new, place))


@no_type_check  # see ``KeysValues``
class PagedKeysValues(NamedTuple):
    """The keys and values that a single token per row may attend to; ``table`` lists the pages."""

    view: PagedView
    table: Int[Tensor, "B M"]

    def attend(
        self,
        q: Float[Tensor, "B H 1 K"],
        scale: float,
        *,
        v_dim: int | None = None,
        own: Own | None = None,
    ) -> Float[Tensor, "B H 1 W"]:
        """See ``KeysValues.attend``."""
        cache, length = self.view.cache, self.view.length
        pools, native = cache.pools, cache.native
        y = paged_attention(
            q[:, :, 0], pools, self.table, length, scale, own, v_dim=v_dim, native=native
        )
        return y[:, :, None]
