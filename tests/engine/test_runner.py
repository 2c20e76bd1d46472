"""Rows of the runner against the reference's batch: one request per seat, any seats in a call."""

import pytest
import torch
from torch.nn import functional

from openmythos.engine import runner as runner_module
from openmythos.engine.batch import CachedBatch
from openmythos.engine.paged_cache import PagedCache
from openmythos.engine.runner import SEPARATE_ROWS, Entry, Part, Runner
from openmythos.model.cache import KVCache
from openmythos.model.exit import Fixed, KLExit, LatentDifferenceExit, Rule
from openmythos.model.recurrent import RecurrentDepthLM
from tests.engine.coherence import MAX_LOOPS, make_model

TEXTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9], [7, 9, 3, 2, 3]]
DEPTHS = [4, 5, 2, 3]
RULES: list[Rule] = [Fixed(), KLExit(threshold=0.05), Fixed(), LatentDifferenceExit(threshold=0.6)]
PAGES = [[9, 2, 4], [1], [7, 3], [5, 8]]
SEEDS = [0, 5, 2**64 - 1, 2**63 + 7]


def make_runner(model: RecurrentDepthLM, **options: bool) -> Runner:
    sizes = {"num_pages": 12, "page_size": 3, "max_loops": MAX_LOOPS}
    cache = PagedCache(model.config, dtype=model.embed.weight.dtype, **sizes)
    return Runner(model, cache, num_seats=5, max_len=12, **options)


def entry(row: int, seat: int) -> Entry:
    """The last token of a text."""
    text = TEXTS[row]
    return Entry(seat, text[-1], len(text) - 1, PAGES[row], DEPTHS[row], RULES[row], SEEDS[row])


def read(runner: Runner, row: int, chunk: int = 4) -> None:
    """All tokens of a text but the last."""
    text = TEXTS[row][:-1]
    for start in range(0, len(text), chunk):
        part = text[start : start + chunk]
        runner.read([Part(part, start, PAGES[row], DEPTHS[row], SEEDS[row])])


def reference(model: RecurrentDepthLM, row: int) -> tuple[torch.Tensor, int, int]:
    """Logits and loops of one text alone, and the core applications."""
    sizes = {"batch_size": 1, "max_len": 12, "max_loops": MAX_LOOPS}
    batch = CachedBatch(model, KVCache(model.config, dtype=torch.float64, **sizes))
    batch.seeds = [SEEDS[row]]
    batch.prefill([TEXTS[row][:-1]], [DEPTHS[row]], 4)
    logits, loops = batch.decode({0: TEXTS[row][-1]}, [DEPTHS[row]], RULES[row])
    return logits[0], loops[0], batch.core_applications


@pytest.mark.parametrize("kind", ["gqa", "universal act, moe, mla", "depth attention"])
@torch.no_grad()
def test_rows_that_enter_at_different_times_equal_each_alone(kind: str) -> None:
    model = make_model(kind)
    runner = make_runner(model)
    seats = {4: 0, 0: 1, 2: 2, 1: 3}  # the row in each seat
    waiting, looping, left, done = list(seats), [], [], {}
    applications = 0
    while len(done) < len(seats):
        for seat in waiting[:1]:
            read(runner, seats[seat])
            runner.enter([entry(seats[seat], seat)])
            looping.append(seat)
        waiting = waiting[1:]
        stopped = runner.advance(looping)
        looping, left = [seat for seat in looping if seat not in stopped], left + stopped
        if len(left) > 1 or not (looping or waiting):
            logits, loops = runner.leave(left)
            done |= {s: each for s, *each in zip(left, logits, loops, strict=True)}
            left = []
    for seat, (logits, loops) in done.items():
        wanted, taken, work = reference(model, seats[seat])
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)
        assert loops == taken
        applications += work
    assert runner.core_applications == applications


@torch.no_grad()
def test_logits_that_a_rule_needed_are_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gqa")
    runner = make_runner(model)
    read(runner, 1)
    runner.enter([entry(1, 0)])
    calls: list[int] = []
    decode = runner._decode
    monkeypatch.setattr(runner, "_decode", lambda seats: calls.append(1) or decode(seats))
    loops = 1
    while not runner.advance([0]):
        loops += 1
    assert loops < DEPTHS[1] and len(calls) == loops
    logits, _ = runner.leave([0])
    assert len(calls) == loops
    assert torch.equal(logits, decode([0]))


@torch.no_grad()
def test_seats_of_nobody_fill_up_a_call_and_change_nothing(monkeypatch) -> None:
    """The row counts of compiled calls, run eagerly."""
    model, seen = make_model("act"), []
    plain, padded = make_runner(model), make_runner(model)
    padded.compiled = True
    monkeypatch.setattr(runner_module, "record", lambda call: (call(), call))
    context = padded._make_context
    monkeypatch.setattr(
        padded,
        "_make_context",
        lambda given, width: seen.append(given.shape[1]) or context(given, width),
    )
    for runner in (plain, padded):
        for row in (0, 2, 3):
            read(runner, row)
        runner.enter([entry(row, seat) for seat, row in enumerate((0, 2, 3))])
        for _ in range(2):
            runner.advance([0, 1, 2])
    assert set(seen) == {4}
    for one, other in zip(plain.leave([2, 0, 1])[0], padded.leave([2, 0, 1])[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert [len(padded._padded(range(n))) for n in range(1, 6)] == [1, 2, 4, 4, 5]


@torch.no_grad()
def test_calls_of_a_batch_invariant_runner_have_one_size(monkeypatch) -> None:
    model, seen = make_model("moe", torch.float32), []
    runner = make_runner(model, batch_invariant=True)
    context = runner._context
    monkeypatch.setattr(
        runner, "_context", lambda rows, given: seen.append(len(rows)) or context(rows, given)
    )
    for row in range(4):
        read(runner, row)
        runner.enter([entry(row, row)])
        runner.advance(list(range(row + 1)))
    runner.leave([0, 1])
    assert {size for size in seen if size > 2} == {SEPARATE_ROWS}  # two are copied, not computed
    single = Runner(model, runner.cache, num_seats=1, max_len=12, batch_invariant=True)
    assert list(single._padded([0])) == [0]


def test_a_machine_whose_products_depend_on_the_place_is_refused(monkeypatch) -> None:
    linear = functional.linear

    def depends(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = linear(x, weight)
        y[-1] += 1e-6 * (len(weight) == 19)
        return y

    monkeypatch.setattr(functional, "linear", depends)
    with pytest.raises(ValueError, match=r"not possible here: products with .* shape \[19, 12\]"):
        make_runner(make_model("gqa"), batch_invariant=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gqa", "universal act, moe, mla", "depth attention"])
def test_parts_of_similar_length_are_read_in_one_call(kind: str, monkeypatch) -> None:
    """Padding is stored nowhere, and every text has its own depth."""
    model, calls = make_model(kind), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *args: calls.append(args[0].shape) or encode(*args))
    parts = [Part(TEXTS[row][:-1], 0, PAGES[row], DEPTHS[row], SEEDS[row]) for row in range(4)]
    alone, together = make_runner(model), make_runner(model)
    for part in parts:
        alone.read([part])
    calls.clear()
    together.read(parts)
    assert calls == [(2, 6), (1, 1), (1, 3)]
    assert together.core_applications == alone.core_applications
    for one, other in zip(alone.cache.pools, together.cache.pools, strict=True):
        shape = alone.cache.num_slots, alone.cache.num_pages
        one, other = (pool.unflatten(0, shape)[:, 1:] for pool in (one, other))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    calls.clear()
    make_runner(model, batch_invariant=True).read(parts)
    assert len(calls) == 4
