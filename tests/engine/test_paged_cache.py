"""Pages against the dense cache: the same model calls give the same logits."""

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from openmythos.config import (
    ACTConfig,
    DepthAttentionConfig,
    NormalInitConfig,
    SinusoidalLoopConfig,
    WeightLoRAConfig,
)
from openmythos.engine.page_pool import SCRATCH
from openmythos.engine.paged_cache import PagedCache, PagedContext
from openmythos.model.cache import EveryK, FirstLoop, KVCache, LastLoop, PerLoop
from openmythos.model.loop import readout, start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import MLA, MOE, random_model, random_tokens, small_config, unchecked

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"loop_embedding": SinusoidalLoopConfig(num_channels=4)},
    "mla": {"attention": MLA, "loop_adapter": WeightLoRAConfig(rank=2, num_loops=3)},
    "moe, act": {"core_feed_forward": MOE, "halting": ACTConfig()},
    "depth attention": {"depth_attention": DepthAttentionConfig(num_recent_loops=2)},
    "no coda, no rope": {"num_prelude_layers": 0, "num_coda_layers": 0, "rope": None},
}
PAGE, MAX_LOOPS = 3, 5
SEEDS = torch.tensor([[5], [6], [7]])
# Per call: the rows, the tokens of each row, the loops of each row.
CALLS = [
    ([0, 1, 2], [4, 1, 2], [3, 5, 2]),
    ([0, 1, 2], [1, 1, 1], [1, 4, 2]),
    ([2, 0], [1, 1], [5, 3]),
    ([1], [5], [2]),
    ([1, 2], [3, 3], [4, 4]),
    ([0, 1, 2], [1, 1, 1], [2, 1, 5]),
]


def make_model(kind: str) -> RecurrentDepthLM:
    config = small_config(state_init=NormalInitConfig(), **KINDS[kind])
    return random_model(config, dtype=torch.float64)


def make_cache(model: RecurrentDepthLM, layout: PerLoop) -> PagedCache:
    options = {"num_pages": 20, "page_size": PAGE, "max_loops": MAX_LOOPS, "layout": layout}
    cache = PagedCache(model.config, dtype=torch.float64, **options)
    for pool in cache.pools:
        pool[cache.num_pages - 1 :: cache.num_pages] = torch.nan  # a page of nobody
    return cache


def logits_by_dense_cache(model: RecurrentDepthLM, layout: PerLoop) -> list[Tensor]:
    cache = KVCache(
        model.config,
        batch_size=3,
        max_len=30,
        max_loops=MAX_LOOPS,
        layout=layout,
        dtype=torch.float64,
    )
    found = []
    for tokens, valid, rows, depths in calls(model):
        seeds = SEEDS[rows]
        ctx = model.context(tokens, padding_mask=valid, cache=cache, rows=rows, seeds=seeds)
        logits = model(tokens, num_loops=depths, ctx=ctx).logits
        found += [row[mask] for row, mask in zip(logits, valid, strict=True)]
    return found


def calls(model: RecurrentDepthLM):
    for number, (rows, counts, depths) in enumerate(CALLS):
        tokens = random_tokens(model.config, len(rows), max(counts), seed=number)
        valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        yield tokens, valid, rows, depths


class Rows:
    """Three rows in scattered pages."""

    def __init__(self, model: RecurrentDepthLM, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.lengths, self.tables = [0, 0, 0], [[], [], []]
        self.numbers = iter([11, 3, 7, 1, 15, 2, 8, 12, 4, 14, 5, 13, 6, 9, 10, 16, 17])

    def context(self, tokens: Tensor, valid: Tensor, rows: list[int]) -> PagedContext:
        counts = valid.sum(dim=1).tolist()
        before = torch.tensor([self.lengths[row] for row in rows])[:, None]
        positions = (before + valid.cumsum(dim=1) - 1).clamp(min=0)
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
            while len(self.tables[row]) * PAGE < self.lengths[row]:
                self.tables[row].append(next(self.numbers))
        width = max(len(self.tables[row]) for row in rows)
        nobody = self.cache.num_pages - 1
        table = [self.tables[row] + [nobody] * (width - len(self.tables[row])) for row in rows]
        padding = None if bool(valid.all()) else valid
        return self.cache.context(tokens, positions, torch.tensor(table), SEEDS[rows], padding)

    def read(self, tokens: Tensor, valid: Tensor, rows: list[int], depths: list[int]) -> Tensor:
        model, ctx = self.model, self.context(tokens, valid, rows)
        start = start_loops(model, model.encode(tokens, ctx), ctx, depths, wait=True)
        *_, state = unroll(model, start, ctx)
        view, real = ctx.cache, valid.nonzero().tolist()
        self.cache.fill_forward(
            [
                (int(view.page[row, t]), int(view.offset[row, t]), depths[row], MAX_LOOPS)
                for row, t in real
            ]
        )
        return model.decode(readout(model, state), ctx)


LAYOUTS = [PerLoop(), EveryK(2), LastLoop(), FirstLoop()]


CASES = [
    (kind, layout)
    for kind, layout in itertools.product(KINDS, LAYOUTS)
    if layout.exact or kind != "depth attention"  # which both caches refuse
]


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=str)
@torch.no_grad()
def test_pages_equal_the_dense_cache(kind: str, layout: PerLoop) -> None:
    with nullcontext() if kind == "depth attention" else unchecked():  # types once: it takes long
        compare(kind, layout)


def compare(kind: str, layout: PerLoop) -> None:
    model = make_model(kind)
    wanted = iter(logits_by_dense_cache(model, layout))
    rows = Rows(model, make_cache(model, layout))
    for tokens, valid, numbers, depths in calls(model):
        logits = rows.read(tokens, valid, numbers, depths)
        for row, mask in zip(logits, valid, strict=True):
            torch.testing.assert_close(row[mask], next(wanted), rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_last_loop_is_shown_up_to_the_depth_of_the_text_and_no_further() -> None:
    model = make_model("gqa")
    for layout in (PerLoop(), EveryK(2)):
        cache = make_cache(model, layout)
        rows = Rows(model, cache)
        for pool in cache.pools:
            pool.fill_(7.0)
        ctx = rows.context(random_tokens(model.config, 1, 1), torch.ones(1, 1) > 0, [0])
        place = slice(cache.core_start, cache.coda_start)
        entries = torch.arange(cache.num_slots)[place] * cache.num_pages + rows.tables[0][0]
        for pool in cache.pools:
            pool[entries, 0] = torch.arange(len(entries), dtype=torch.float64)[:, None, None]
        cache.fill_forward([(int(ctx.cache.page), int(ctx.cache.offset), 2, 4)])
        kept = [layout.slot(min(loop, 1)) if loop < 4 else layout.slot(loop) for loop in range(5)]
        wanted = {layout.slot(loop): slot for loop, slot in enumerate(kept)}
        for pool in cache.pools:
            found = pool[entries, 0, 0, 0].view(-1, cache.num_core_layers)
            for slot, shown in wanted.items():
                source = shown * cache.num_core_layers
                assert found[slot].tolist() == [source, source + 1]


@torch.no_grad()
def test_padding_and_loops_that_are_not_kept_touch_scratch_only() -> None:
    model = make_model("gqa")
    cache = make_cache(model, FirstLoop())
    rows = Rows(model, cache)
    before = [pool.clone() for pool in cache.pools]
    tokens = random_tokens(model.config, 2, 4)
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    rows.read(tokens, valid, [0, 1], [3, 3])
    texts = zip(rows.tables, rows.lengths, strict=True)
    places = [(pages[at // PAGE], at % PAGE) for pages, num in texts for at in range(num)]
    assert len(places) == 6
    for pool, old in zip(cache.pools, before, strict=True):
        changed = (pool != old) & ~(pool.isnan() & old.isnan())
        for entry, at in changed.flatten(2).any(dim=2).nonzero().tolist():
            page = entry % cache.num_pages
            assert page == SCRATCH or (page, at) in places


@torch.no_grad()
def test_copied_pages_hold_the_same_in_every_slot() -> None:
    model = make_model("mla")
    cache = make_cache(model, PerLoop())
    rows = Rows(model, cache)
    rows.read(random_tokens(model.config, 1, 5), torch.ones(1, 5, dtype=torch.bool), [0], [4])
    (first, second), others = rows.tables[0], [18, 17]
    cache.copy([(first, 18), (second, 17)])
    (pool,) = cache.pools
    slots = pool.view(cache.num_slots, cache.num_pages, PAGE, -1)
    assert torch.equal(slots[:, [first, second]], slots[:, others])
    assert bool((slots[:, 18].abs().amax(dim=(1, 2)) > 0).all())


def test_bytes_of_a_page_are_those_of_the_pools() -> None:
    for kind, layout in itertools.product(("gqa", "mla", "moe, act"), LAYOUTS):
        model = make_model(kind)
        cache = make_cache(model, layout)
        size = PagedCache.page_bytes(model.config, PAGE, MAX_LOOPS, layout, torch.float64)
        assert sum(pool.nbytes for pool in cache.pools) == cache.num_pages * size


def test_depth_attention_needs_every_loop() -> None:
    with pytest.raises(ValueError, match=r"loses loops that depth_attention reads; use PerLoop"):
        make_cache(make_model("depth attention"), LastLoop())
