import pytest
import torch
from torch import Tensor

from openmythos.config import DepthAttentionConfig
from openmythos.model.cache import EveryK, FirstLoop, KVCache, LastLoop, PerLoop, RecentLoops
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import GQA, MLA, random_model, random_tokens, small_config

LOOPS = torch.arange(6)


@pytest.mark.parametrize(
    ("layout", "slots", "slot", "writes"),
    [
        (PerLoop(), 6, [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]),
        (EveryK(1), 6, [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]),
        (EveryK(2), 3, [0, 0, 1, 1, 2, 2], [1, 0, 1, 0, 1, 0]),
        (EveryK(4), 2, [0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0]),
        (LastLoop(), 1, [0] * 6, [1] * 6),
        (FirstLoop(), 1, [0] * 6, [1, 0, 0, 0, 0, 0]),
    ],
)
def test_slots_and_writes(layout, slots, slot, writes):
    assert layout.num_slots(6) == slots
    assert layout.slot(LOOPS).tolist() == slot
    assert layout.writes(LOOPS).tolist() == [bool(w) for w in writes]
    assert layout.always_writes <= all(writes)


def cached(
    model: RecurrentDepthLM,
    tokens: Tensor,
    loops: int | Tensor,
    layout: PerLoop,
    max_loops: int = 6,
) -> tuple[Tensor, KVCache]:
    cache = KVCache(
        model.config,
        batch_size=len(tokens),
        max_len=tokens.shape[1],
        max_loops=max_loops,
        layout=layout,
        dtype=model.embed.weight.dtype,
    )
    with torch.no_grad():
        logits = [
            model(token, num_loops=loops, ctx=model.context(token, cache=cache)).logits
            for token in tokens.split(1, dim=1)
        ]
    return torch.cat(logits, dim=1), cache


def emulated(model: RecurrentDepthLM, tokens: Tensor, loops: int, keep: list[int]) -> Tensor:
    """Token by token from a cache of all loops, where loop t reads loop ``keep[t]`` of all tokens.

    The model's own loops at ``t != keep[t]`` must leave no trace, so a step's keys are put back.
    """
    config = model.config
    full = KVCache(
        config,
        batch_size=len(tokens),
        max_len=tokens.shape[1],
        max_loops=loops,
        dtype=torch.float64,
    )
    logits = []
    with torch.no_grad():
        for token in tokens.split(1, dim=1):
            ctx = model.context(token, cache=full)
            e = model.encode(token, ctx)
            h = model.init_state(e, None, ctx)
            for loop in range(loops):
                first = full.core_start + keep[loop] * config.num_core_layers
                where = slice(first, first + config.num_core_layers)
                h = Frozen(model, full, where, fresh=keep[loop] == loop).step(h, e, ctx, keep[loop])
            logits.append(model.decode(h, ctx))
    return torch.cat(logits, dim=1)


class Frozen:
    """One step whose attention reads the slots ``where`` and may not change them unless fresh."""

    def __init__(
        self, model: RecurrentDepthLM, cache: KVCache, where: slice, *, fresh: bool
    ) -> None:
        self.model, self.cache, self.where, self.fresh = model, cache, where, fresh

    def step(self, h: Tensor, e: Tensor, ctx, slot: int) -> Tensor:
        if self.fresh:
            return self.model.step(h, e, torch.full((len(h),), slot), ctx)
        kept = [tensor[self.where].clone() for tensor in self.cache.tensors]
        update = self.cache.update

        def read_only(new, **place):
            update(new, **place)
            for tensor, old in zip(self.cache.tensors, kept, strict=True):
                tensor[self.where] = old
            stop = place["start"] + new[0].shape[2]
            index = self.where.start + place["layer"]
            return tuple(tensor[index, :, :, :stop] for tensor in self.cache.tensors)

        self.cache.update = read_only
        try:
            return self.model.step(h, e, torch.full((len(h),), slot), ctx)
        finally:
            self.cache.update = update


@pytest.mark.parametrize("attention", [GQA, MLA])
@pytest.mark.parametrize(
    ("layout", "keep"),
    [
        (PerLoop(), [0, 1, 2, 3, 4]),
        (EveryK(1), [0, 1, 2, 3, 4]),
        (EveryK(2), [0, 0, 2, 2, 4]),
        (EveryK(3), [0, 0, 0, 3, 3]),
        (FirstLoop(), [0, 0, 0, 0, 0]),
    ],
)
def test_layouts_equal_an_explicit_emulation(attention, layout, keep):
    model = random_model(small_config(attention=attention), dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 5)
    got, _ = cached(model, tokens, 5, layout)
    torch.testing.assert_close(got, emulated(model, tokens, 5, keep), rtol=1e-9, atol=1e-9)


def test_layouts_save_slots_and_change_the_logits():
    model = random_model(small_config(), dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 5)
    exact, full = cached(model, tokens, 5, PerLoop())
    torch.testing.assert_close(exact, model(tokens, num_loops=5).logits)
    for layout, slots in ((EveryK(2), 3), (LastLoop(), 1), (FirstLoop(), 1)):
        logits, cache = cached(model, tokens, 5, layout)
        assert not layout.exact
        assert (logits - exact).abs().max() > 1e-3
        assert len(cache.tensors[0]) == 2 + slots * 2
        assert cache.num_bytes < full.num_bytes
        torch.testing.assert_close(
            logits[:, 0], exact[:, 0] if layout == LastLoop() else logits[:, 0]
        )


def test_last_loop_shows_the_last_loop_of_earlier_tokens():
    config = small_config(num_prelude_layers=0, num_coda_layers=0, num_core_layers=1)
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 1, 3)
    _, every = cached(model, tokens[:, :1], 5, PerLoop(), max_loops=5)
    _, last = cached(model, tokens[:, :1], 5, LastLoop(), max_loops=5)
    torch.testing.assert_close(last.tensors[0][0], every.tensors[0][4])


@pytest.mark.parametrize("layout", [PerLoop(), EveryK(2)])
def test_a_token_that_stopped_shows_its_last_loop_at_deeper_ones(layout):
    config = small_config(num_core_layers=1)
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 3, 4)
    depths = torch.tensor([1, 3, 6])
    _, cache = cached(model, tokens, depths, layout)
    for tensor in cache.tensors:
        core = tensor[cache.core_start : cache.coda_start]
        assert (core.abs().amax(dim=-1) > 0).all()  # no hole anywhere
        for row, depth in enumerate(depths.tolist()):
            last = int(layout.slot(torch.tensor([depth - 1])))
            for slot in range(last + 1, len(core)):
                assert torch.equal(core[slot, row], core[last, row])
            for slot in range(last):
                assert not torch.equal(core[slot, row], core[last, row])


def test_fill_forward_touches_only_its_rows_and_columns():
    config = small_config(num_core_layers=1)
    cache = KVCache(config, batch_size=3, max_len=4, max_loops=3)
    for tensor in cache.tensors:
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in cache.tensors]
    cache.fill_forward(torch.tensor([2]), torch.tensor([2]), 1, 3)
    for tensor, old in zip(cache.tensors, before, strict=True):
        old[cache.core_start + 2, 2, :, 1:3] = old[cache.core_start + 1, 2, :, 1:3]
        assert torch.equal(tensor, old)


def test_rows_of_a_larger_cache():
    model = random_model(small_config(), dtype=torch.float64)
    config, tokens = model.config, random_tokens(model.config, 3, 4)
    cache = KVCache(config, batch_size=3, max_len=4, max_loops=2, dtype=torch.float64)
    ctx = model.context(tokens, cache=cache)
    part = ctx.select(torch.tensor([2, 0]))
    with torch.no_grad():
        logits = model(part.tokens, num_loops=2, ctx=part).logits
        torch.testing.assert_close(logits, model(tokens[[2, 0]], num_loops=2).logits)
    assert not cache.tensors[0][:, 1].any()


def test_a_cache_of_another_dtype_converts():
    model = random_model(small_config())
    tokens = random_tokens(model.config, 1, 4)
    cache = KVCache(model.config, batch_size=1, max_len=4, max_loops=2, dtype=torch.bfloat16)
    for token in tokens.split(1, dim=1):
        out = model(token, num_loops=2, ctx=model.context(token, cache=cache))
    assert out.logits.dtype == torch.float32
    wanted = model(tokens, num_loops=2).logits[:, -1:]
    assert (out.logits - wanted).norm() / wanted.norm() < 0.05


def test_a_full_cache_is_an_error_that_reserves_nothing():
    model = random_model(small_config())
    cache = KVCache(model.config, batch_size=1, max_len=4, max_loops=2)
    model.context(random_tokens(model.config, 1, 3), cache=cache)
    with pytest.raises(ValueError, match=r"3 \+ 2 tokens do not fit a cache of max_len=4"):
        model.context(random_tokens(model.config, 1, 2), cache=cache)
    assert cache.length == 3


def test_another_batch_size_is_an_error():
    model = random_model(small_config())
    cache = KVCache(model.config, batch_size=2, max_len=4, max_loops=2)
    with pytest.raises(ValueError, match="3 rows given to a cache made for 2"):
        model.context(random_tokens(model.config, 3, 2), cache=cache)


def test_k_is_at_least_one():
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        EveryK(0)


# --- the loops that a token reads of itself ------------------------------------------------------

DEPTH = small_config(depth_attention=DepthAttentionConfig(num_recent_loops=2))


@pytest.mark.parametrize("layout", [EveryK(1), EveryK(2), LastLoop(), FirstLoop()])
def test_layouts_that_lose_loops_are_refused_in_one_line(layout):
    with pytest.raises(
        ValueError, match="loses loops that depth_attention reads; use PerLoop"
    ) as e:
        KVCache(DEPTH, batch_size=1, max_len=4, max_loops=2, layout=layout)
    assert "\n" not in str(e.value)


def loop_keys(loop: int, rows: int = 3, tokens: int = 2) -> tuple[Tensor, Tensor]:
    """Keys that name their loop and row; values are their negatives."""
    names = 10.0 * (loop + 1) + torch.arange(rows).view(rows, 1, 1, 1)
    keys = names.expand(rows, 2, tokens, 4)
    return keys, -keys


def named(tensor: Tensor) -> list[list[float]]:
    return tensor[:, :, 0, 0, 0].tolist()


def test_the_cache_shows_each_row_its_own_earlier_loops():
    cache = KVCache(DEPTH, batch_size=3, max_len=5, max_loops=4)
    place = {"layer": 1, "rows": None, "start": 2}
    for loop in range(4):
        where = torch.full((3,), loop)
        cache.update(loop_keys(loop), stage="core", loop_idx=where, **place)
    keys, values = cache.earlier(2, loop_idx=torch.tensor([3, 1, 2]), stop=4, **place)
    assert keys.shape == (2, 3, 2, 2, 4)
    assert named(keys) == [[30, 11, 22], [20, 11, 12]]  # row 1 has run one loop: it stands in
    assert torch.equal(values, -keys)
    place["rows"] = torch.tensor([2, 0])
    keys, _ = cache.earlier(1, loop_idx=torch.tensor([1, 3]), stop=4, **place)
    assert named(keys) == [[12, 30]]
    other, _ = cache.earlier(1, loop_idx=torch.tensor([1, 3]), layer=0, rows=None, start=2, stop=4)
    assert not other.any()


def test_recent_loops_come_newest_first_and_rows_may_wait():
    recent = RecentLoops(DEPTH, torch.zeros(3, 2, dtype=torch.int64), torch.float32)
    keys, _ = recent.exchange(loop_keys(0), layer=0, rows=None)
    assert keys.shape == (2, 3, 2, 2, 4)
    assert not keys.any()
    some = torch.tensor([2, 0])
    keys, values = recent.exchange(loop_keys(1, rows=2), layer=0, rows=some)
    assert named(keys) == [[12, 10], [0, 0]]
    assert torch.equal(values, -keys)
    keys, _ = recent.exchange(loop_keys(2), layer=0, rows=None)
    assert named(keys) == [[21, 11, 20], [10, 0, 12]]
    assert not recent.exchange(loop_keys(0), layer=1, rows=None)[0].any()


def test_recent_loops_are_replaced_and_carry_gradients():
    recent = RecentLoops(DEPTH, torch.zeros(1, 2, dtype=torch.int64), torch.float32)
    fresh = tuple(tensor.clone().requires_grad_() for tensor in loop_keys(0, rows=1))
    before = recent.exchange(fresh, layer=0, rows=None)
    keys, values = recent.exchange(loop_keys(1, rows=1), layer=0, rows=None)
    assert not any(tensor.any() for tensor in before)
    (keys.sum() + 2 * values.sum()).backward()
    assert fresh[0].grad.unique().tolist() == [1]
    assert fresh[1].grad.unique().tolist() == [2]
