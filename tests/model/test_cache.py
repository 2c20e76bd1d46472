from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from openmythos.config import DepthAttentionConfig
from openmythos.model.cache import (
    CacheView,
    EveryK,
    FirstLoop,
    KVCache,
    LastLoop,
    PerLoop,
    Place,
)
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import GQA, MLA, random_model, random_tokens, small_config, unchecked

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
            h = model.init_state(e, ctx)
            for loop in range(loops):
                frozen = ReadOnly(**fields_of(ctx.cache)) if keep[loop] != loop else ctx.cache
                h = model.step(h, e, torch.full((len(h),), keep[loop]), replace(ctx, cache=frozen))
            logits.append(model.decode(h, ctx))
            ctx.cache.commit()
    return torch.cat(logits, dim=1)


def fields_of(view: CacheView) -> dict[str, object]:
    return {field.name: getattr(view, field.name) for field in fields(view)}


class ReadOnly(CacheView):
    """Shows what stands in the cache and keeps nothing."""

    def _write(self, tensor: Tensor, slot: int | Tensor, stored: Tensor) -> None:
        pass


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
    cache.lengths = [0, 2, 1]
    before = [tensor.clone() for tensor in cache.tensors]
    cache.view(2, rows=[2]).fill_forward(torch.tensor([2]))
    for tensor, old in zip(cache.tensors, before, strict=True):
        old[cache.core_start + 2, 2, :, 1:3] = old[cache.core_start + 1, 2, :, 1:3]
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("same_loop", [True, False])
@pytest.mark.parametrize(
    ("lengths", "valid", "rows"),
    [
        ([2, 2, 2], None, None),
        ([1, 3, 0], None, None),
        ([1, 3, 0], [[1, 0, 1], [0, 0, 0], [1, 1, 1]], None),
        ([2, 0, 1], None, [2, 1]),
        ([2, 1, 1], [[0, 1, 0], [1, 1, 0]], [2, 0]),
    ],
)
def test_every_way_to_write_fills_the_same_columns(lengths, valid, rows, same_loop):
    """Against plain loops: rows with prefixes of their own, padding anywhere, some of the rows."""
    config, loop = small_config(), 1
    cache = KVCache(config, batch_size=3, max_len=7, max_loops=3)
    for tensor in cache.tensors:
        tensor.copy_(torch.randn(tensor.shape))
    cache.lengths = list(lengths)
    wanted = [tensor.clone() for tensor in cache.tensors]
    chosen = [0, 1, 2] if rows is None else rows
    mask = None if valid is None else torch.tensor(valid).bool()
    view = cache.view(3, mask, rows)
    view = replace(view, loop=loop if same_loop else None)
    new = tuple(torch.randn(len(chosen), 2, 3, 4) for _ in cache.tensors)
    where = torch.full((len(chosen),), loop)
    read = view.store(new, Place("core", 1, where))
    slot = cache.core_start + loop * 2 + 1
    for tensor, fresh, old, seen in zip(cache.tensors, new, wanted, read, strict=True):
        for i, row in enumerate(chosen):
            column = lengths[row]
            for t in range(3):
                if valid is None or valid[i][t]:
                    assert int(view.columns[i, t]) == column
                    old[slot, row, :, column] = fresh[i, :, t]
                    column += 1
        assert torch.equal(tensor, old)
        assert torch.equal(seen, old[slot, chosen, :, : view.stop])
    view.commit()
    counts = [3] * len(chosen) if valid is None else [sum(row) for row in valid]
    for row, count in zip(chosen, counts, strict=True):
        assert cache.lengths[row] == lengths[row] + count


def test_the_keys_of_one_loop_are_read_where_they_lie():
    cache = KVCache(small_config(), batch_size=2, max_len=4, max_loops=3)
    new = tuple(torch.randn(2, 2, 1, 4) for _ in cache.tensors)
    place = Place("core", 0, torch.tensor([1, 1]))
    for loop, copied in ((1, False), (None, True)):
        read = replace(cache.view(1), loop=loop).store(new, place)
        for tensor, seen in zip(cache.tensors, read, strict=True):
            theirs, ours = (each.untyped_storage().data_ptr() for each in (seen, tensor))
            assert (theirs != ours) == copied


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
    model.context(random_tokens(model.config, 1, 3), cache=cache).cache.commit()
    with pytest.raises(ValueError, match=r"3 \+ 2 tokens of row 0 do not fit a cache of max_len=4"):
        model.context(random_tokens(model.config, 1, 2), cache=cache)
    assert cache.length == 3


def test_a_stale_context_is_refused_before_it_writes():
    model = random_model(small_config(), dtype=torch.float64)
    tokens = random_tokens(model.config, 1, 3)
    cache = KVCache(model.config, batch_size=1, max_len=8, max_loops=2, dtype=torch.float64)
    first, second = (model.context(tokens, cache=cache) for _ in range(2))
    with torch.no_grad():
        model(tokens, num_loops=2, ctx=first)
        kept = [tensor.clone() for tensor in cache.tensors]
        for stale in (first, second):
            with pytest.raises(RuntimeError, match="make a context for each chunk"):
                model(tokens.flip(1), num_loops=2, ctx=stale)
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors, kept, strict=True))


@pytest.mark.parametrize("rows", [[0, 0], [1, -1], [0, 2]])
def test_rows_are_different_rows_of_the_cache(rows):
    model = random_model(small_config())
    cache = KVCache(model.config, batch_size=2, max_len=4, max_loops=2)
    with pytest.raises(ValueError, match=r"they must be different numbers in 0\.\.1"):
        model.context(random_tokens(model.config, 2, 2), cache=cache, rows=rows)
    with pytest.raises(ValueError, match=r"rows are .* without a cache"):
        model.context(random_tokens(model.config, 2, 2), rows=rows)


def test_another_batch_size_is_an_error():
    model = random_model(small_config())
    cache = KVCache(model.config, batch_size=2, max_len=4, max_loops=2)
    with pytest.raises(ValueError, match="3 rows given to a cache made for 2"):
        model.context(random_tokens(model.config, 3, 2), cache=cache)


def test_what_a_failed_forward_left_is_not_read():
    """A weight of 0 times NaN is NaN: columns past a row's length must be clean."""
    model = random_model(small_config(), dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 6)
    real = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    cache = KVCache(model.config, batch_size=2, max_len=8, max_loops=2, dtype=torch.float64)
    with torch.no_grad():
        broken = model.context(tokens[:, :5], cache=cache)
        for tensor in cache.tensors:  # what a forward leaves that overflows and is given up
            tensor[:, :, :, :5] = torch.nan
        ctx = model.context(tokens[:, :3], cache=cache, padding_mask=real)
        got = model(tokens[:, :3], num_loops=2, ctx=ctx).logits
        one = model.context(tokens[:, 3:4], cache=cache)
        after = model(tokens[:, 3:4], num_loops=2, ctx=one).logits
        short = torch.cat((tokens[1:, :1], tokens[1:, 3:4]), dim=1)
        alone = model(short, num_loops=2).logits
    torch.testing.assert_close(got[1, :1], alone[0, :1])
    torch.testing.assert_close(after[1], alone[0, 1:])
    with pytest.raises(RuntimeError, match="make a context for each chunk"):
        broken.cache.commit()
    cache.lengths[0] = 1  # a row that is taken back
    for tensor in cache.tensors:
        tensor[:, 0, :, 1:] = torch.nan
    again = model.context(tokens[:1, 1:2], cache=cache, rows=[0])
    with torch.no_grad():
        logits = model(tokens[:1, 1:2], num_loops=2, ctx=again).logits
    torch.testing.assert_close(logits[0, 0], got[0, 1])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"layout": layout} for layout in ("last_loop", LastLoop, 3, {})),
        *({"batch_size": size} for size in (0, 2.0, True, "2", [2])),
        *({"max_len": size} for size in (0, 2.5, "8", None)),
        *({"max_loops": size} for size in (0, -1, 2.5, torch.tensor([2, 2]))),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_cache_are_refused_by_name(wrong):
    given = {"batch_size": 2, "max_len": 8, "max_loops": 2, **wrong}
    with unchecked(), pytest.raises(ValueError, match=f"^{next(iter(wrong))} is .* must be"):
        KVCache(small_config(), **given)


def test_integers_of_numpy_and_torch_are_integers():
    two, eight = np.int64(2), torch.tensor(8)
    with unchecked():
        cache = KVCache(small_config(), batch_size=two, max_len=eight, max_loops=two)
        view = cache.view(1, rows=torch.tensor([1]))
    assert (cache.lengths, cache.max_len, cache.max_loops) == ([0, 0], 8, 2)
    assert view.lengths == ((1, 0, 1),)
    with unchecked(), pytest.raises(ValueError, match=r"a row of the cache is 0\.0"):
        cache.view(1, rows=[0.0])


def test_k_is_at_least_one():
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        EveryK(0)


# --- the loops that a token reads of itself ------------------------------------------------------

DEPTH = small_config(depth_attention=DepthAttentionConfig(num_recent_loops=2))


@pytest.mark.parametrize("layout", [EveryK(1), EveryK(2), LastLoop(), FirstLoop()])
def test_layouts_that_lose_loops_are_refused_in_one_line(layout):
    with pytest.raises(
        ValueError, match="loses loops that depth_attention reads; use per_loop"
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
    cache.lengths = [2, 0, 1]
    view = cache.view(2)
    for loop in range(4):
        view.store(loop_keys(loop), Place("core", 1, torch.full((3,), loop)))
    keys, values = view.earlier(Place("core", 1, torch.tensor([3, 1, 2])), 2)
    assert keys.shape == (2, 3, 2, 2, 4)
    assert named(keys) == [[30, 11, 22], [20, 11, 12]]  # row 1 has run one loop: it stands in
    assert torch.equal(values, -keys)
    part = view.select(torch.tensor([2, 0]))
    keys, _ = part.earlier(Place("core", 1, torch.tensor([1, 3])), 1)
    assert named(keys) == [[12, 30]]
    other, _ = part.earlier(Place("core", 0, torch.tensor([1, 3])), 1)
    assert not other.any()
