"""The engine: coherence with the reference, and what a client is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import openmythos as om
from benchmarks.engine_device import run as run_on_device
from openmythos.engine import compile as compiling
from openmythos.engine.call_cost import CallCosts
from openmythos.engine.engine import Engine, EngineConfig, Event
from openmythos.engine.paged_cache import PagedCache
from openmythos.engine.reference import Session
from openmythos.engine.request import Request
from openmythos.engine.runner import Runner
from openmythos.engine.sampling import SamplingConfig
from openmythos.model.cache import LastLoop, PerLoop
from openmythos.model.exit import CumulativeThreshold, KLExit, LatentDifferenceExit
from openmythos.model.recurrent import RecurrentDepthLM
from tests.engine.coherence import (
    MAX_LOOPS,
    Arrival,
    Schedule,
    abort_at_random,
    alone,
    check,
    check_bits,
    check_ties,
    differences,
    draw_schedule,
    make_model,
)
from tests.strategies import unchecked

CONFIG = EngineConfig(
    max_rows=4, max_len=40, max_loops=MAX_LOOPS, page_size=2, num_pages=60, prefill_chunk=4
)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
RULE = LatentDifferenceExit(threshold=0.5)


def make_request(**changes: Any) -> Request:
    fields = {"tokens": PROMPT, "max_new_tokens": 6, "num_loops": 4, "logprobs": 2}
    return Request(**fields | changes)


def make_engine(kind: str = "gqa", **changes: Any) -> Engine:
    return Engine(make_model(kind), replace(CONFIG, **changes))


def run(engine: Engine, steps: int = 5000) -> dict[int, list[Event]]:
    """The events of each request until all have ended."""
    events: dict[int, list[Event]] = {}
    for _ in range(steps):
        if engine.is_idle:
            return events
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    raise AssertionError(engine.stats)


def same(engine: Engine, request: Request, events: list[Event]) -> bool:
    wanted = alone(engine.model, engine.config, request)
    return not list(differences(events, wanted))


@pytest.fixture(autouse=True)
def without_type_checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """They take several times as long as the models; one test keeps them."""
    if request.node.name == "test_public_names":
        yield
        return
    with unchecked():
        yield


# --- coherence: a request's tokens, loops and log-probabilities depend on the request alone -------


@pytest.mark.parametrize("number", range(20))
def test_random_schedules_give_what_each_request_gives_alone(number: int) -> None:
    found, _ = check(draw_schedule(number))
    assert found == []


def test_the_schedules_cover_what_they_should() -> None:
    drawn = [draw_schedule(number) for number in range(20)]
    assert len({schedule.kind for schedule in drawn}) == 7
    assert {str(PerLoop()), str(LastLoop())} <= {str(s.config.cache_layout) for s in drawn}
    requests = [arrival.request for schedule in drawn for arrival in schedule.arrivals]
    assert len({type(request.exit_rule) for request in requests}) == 7
    assert any(request.sample_idx for request in requests)
    assert any(arrival.patience is not None for s in drawn for arrival in s.arrivals)


@pytest.mark.parametrize("kind", ["gqa", "universal act, moe, mla"])
@pytest.mark.parametrize("layout", [None, LastLoop()])
def test_an_engine_that_fits_gives_what_a_session_gives(kind: str, layout: Any) -> None:
    """In its batch, prompts read at once: also one that is longer than a chunk would be."""
    model = make_model(kind)
    requests = [
        make_request(tokens=(PROMPT * 5)[:length], seed=7, sample_idx=row, **changes)
        for row, (length, changes) in enumerate(
            [(3, {}), (41, {"exit_rule": RULE}), (41, {"sampling": SamplingConfig(temperature=1)})]
        )
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "prefill_chunk", 16)
        engine = Engine.fitting(model, requests, cache_layout=layout)
    numbers = [engine.add(request) for request in requests]
    events = run(engine)
    for number, request in zip(numbers, requests, strict=True):
        session = Session.fitting(model, [request], cache_layout=layout)
        assert not list(differences(events[number], list(session.stream([request]))))
    assert engine.stats.num_free_pages == engine.stats.num_pages
    with refused(r"prompt 1 is \[99\]"):
        Engine.fitting(model, [requests[0], make_request(tokens=[99])])


MUTANT = Schedule(
    "gqa",
    replace(CONFIG, cache_layout=PerLoop(), hold_rows=2, max_hold_ms=1e6),
    [
        Arrival(0, make_request(exit_rule=LatentDifferenceExit(threshold=0.35), num_loops=5)),
        Arrival(0, make_request(tokens=PROMPT[::-1], num_loops=5)),
    ],
)


def test_what_the_mutations_change_is_coherent_without_them() -> None:
    found, played = check(MUTANT)
    assert found == []
    loops = [event.num_loops for event in played.events[0]]
    assert min(loops[:2]) < max(loops[2:]), f"no token reads past an earlier exit: {loops}"


def test_two_swapped_pages_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two requests: the keys of one carry their positions, and may be in any order."""
    enter = Runner.enter

    def swapped(runner: Runner, entries: list[Any]) -> None:
        if len(entries) == 2:
            (first, *rest), (other, *others) = (entry.pages for entry in entries)
            pages = (other, *rest), (first, *others)
            entries = [replace(e, pages=p) for e, p in zip(entries, pages, strict=True)]
        enter(runner, entries)

    monkeypatch.setattr(Runner, "enter", swapped)
    found, _ = check(MUTANT)
    assert any("log-probabilities" in each for each in found)


@pytest.mark.parametrize("left_out", [1, 2])
def test_one_forward_fill_left_out_is_noticed(monkeypatch, left_out: int) -> None:
    fill, calls = PagedCache.fill_forward, []

    def fill_most(cache: PagedCache, tokens: list) -> None:
        calls.append(tokens)
        if len(calls) != left_out:
            fill(cache, tokens)

    monkeypatch.setattr(PagedCache, "fill_forward", fill_most)
    found, _ = check(MUTANT)
    assert len(calls) > left_out and any("log-probabilities" in each for each in found)


@pytest.mark.parametrize("number", [7, 9, 17])
def test_batch_invariant_logits_are_those_alone_to_the_last_bit(number: int) -> None:
    found, played = check_bits(draw_schedule(number))
    assert found == [] and played.engine.stats.num_new_tokens > 0


CROWD = Schedule(
    "gqa",
    replace(CONFIG, max_rows=19, num_pages=200),
    [
        Arrival(
            row % 5,
            make_request(
                tokens=PROMPT[row % 7 :], seed=row, exit_rule=rule, num_loops=3, max_new_tokens=2
            ),
        )
        for row, rule in enumerate([None, RULE, KLExit(threshold=0.05)] * 6)
    ],
)


def test_more_rows_than_a_batch_invariant_call_takes_are_several_calls() -> None:
    found, _ = check_bits(CROWD)
    assert found == []


def test_bits_differ_without_batch_invariance() -> None:
    """So that the tests before mean something."""
    found, _ = check_bits(replace(CROWD, arrivals=CROWD.arrivals[:4]), batch_invariant=False)
    assert any("differ by" in each for each in found)


@pytest.mark.parametrize("number", [1, 4])
def test_in_fp32_tokens_differ_from_the_references_only_where_two_are_as_likely(number) -> None:
    found, counts = check_ties(draw_schedule(number))
    assert found == [] and counts["requests"] > 0


def test_a_batch_invariant_engine_computes_the_same() -> None:
    """Up to the last bits; it shares whole chunks and decodes again after a preemption."""
    engine = make_engine(batch_invariant=True, num_pages=14, prefill_chunk=8)
    requests = [make_request(exit_rule=rule, max_new_tokens=12) for rule in (RULE, None, RULE)]
    numbers = [engine.add(request) for request in requests]
    events = run(engine)
    for number, request in zip(numbers, requests, strict=True):
        assert same(engine, request, events[number])
    assert engine.stats.num_preempted > 0
    assert engine.stats.num_prompt_tokens_found == len(PROMPT) - 1


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_in_fp32_a_difference_is_a_near_tie(kind: str) -> None:
    """With our kernel: sums of other orders may change a token where two are as likely."""
    model = make_model(kind).float()
    engine = Engine(model, replace(CONFIG, hold_rows=2))
    requests = [make_request(tokens=PROMPT[first:], max_new_tokens=12) for first in range(4)]
    for request in requests:
        engine.add(request)
    for number, events in run(engine).items():
        for event, new in zip(events, alone(model, CONFIG, requests[number]), strict=False):
            (_, best), (_, second) = new.logprobs.top
            if event.token != new.token:
                assert best - second < 1e-4
                break
            assert event.logprobs.chosen == pytest.approx(new.logprobs.chosen, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler", "fresh_compiler")
@pytest.mark.parametrize(("max_rows", "backend"), [(4, "graphs"), (1, "inductor")])
def test_a_compiled_engine_gives_what_each_request_gives_alone(
    max_rows: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to three rows at different loops; the third is filled up by a seat of nobody.

    Inductor needs a minute for three numbers of rows: it compiles one, and the graphs of all are
    run as they were recorded.
    """
    if backend == "graphs":
        monkeypatch.setattr(compiling, "_backend", lambda graph, inputs: graph)
    engine = make_engine("universal act, moe, mla", max_rows=max_rows, compiled=True)
    with unchecked():
        engine.warm_up()
    with torch.compiler.set_stance("fail_on_recompile"):
        requests = [
            make_request(tokens=PROMPT[first:], num_loops=2 + first, exit_rule=rule)
            for first, rule in enumerate((None, RULE, KLExit(threshold=0.05)))
        ]
        for request in requests:
            engine.add(request)
            engine.step()
        events = run(engine)
    assert all(same(engine, requests[n], each) for n, each in events.items())


def test_measured_costs_decide_who_waits_and_change_no_result(monkeypatch) -> None:
    crossings, leave = [], Runner.leave
    monkeypatch.setattr(
        Runner, "leave", lambda r, seats: crossings.append(seats) or leave(r, seats)
    )
    numbers = {}
    for seconds in (1e-6, 1e6):  # of a crossing
        engine = make_engine(max_hold_ms=1e6)
        engine.warm_up()
        costs = engine._scheduler.costs
        assert costs is not None and set(costs.core) == set(costs.boundary) == {1, 2, 4}
        assert min(*costs.core.values(), *costs.boundary.values()) > 0
        rows = dict.fromkeys((1, 2, 4), 1.0)
        engine._scheduler.costs = CallCosts(rows, dict.fromkeys(rows, seconds))
        requests = [make_request(num_loops=2 + n, seed=n, max_new_tokens=4) for n in range(4)]
        for request in requests:
            engine.add(request)
        crossings.clear()
        assert all(same(engine, requests[n], each) for n, each in run(engine).items())
        numbers[seconds] = len(crossings)
    assert numbers[1e6] < numbers[1e-6]


# --- what is shared -------------------------------------------------------------------------------


def test_a_prompt_is_read_once_for_several_samples() -> None:
    engine = make_engine()
    requests = [
        make_request(sampling=SamplingConfig(temperature=1.0), sample_idx=index)
        for index in range(3)
    ]
    numbers = [engine.add(request) for request in requests]
    events = run(engine)
    assert engine.stats.num_prompt_tokens_read == len(PROMPT) - 1
    assert engine.stats.num_prompt_tokens_found == 2 * (len(PROMPT) - 1)
    for number, request in zip(numbers, requests, strict=True):
        assert same(engine, request, events[number])
    assert len({tuple(e.token for e in events[n]) for n in numbers}) > 1


def test_a_second_turn_reads_the_answer_again_and_finds_the_prompt() -> None:
    """Pages of an answer with early exits are not those of the same tokens as a prompt."""
    engine = make_engine()
    first = make_request(exit_rule=RULE, max_new_tokens=7)
    number = engine.add(first)
    answer = [event.token for event in run(engine)[number]]
    assert any(event.num_loops < 4 for event in alone(engine.model, engine.config, first)[:-1])
    second = replace(first, tokens=[*PROMPT, *answer, 7, 8], max_new_tokens=5)
    number = engine.add(second)
    events = run(engine)[number]
    assert same(engine, second, events)
    found = len(PROMPT) - 1  # full pages of the first prompt, without its last token
    assert engine.stats.num_prompt_tokens_found == found
    assert engine.stats.num_prompt_tokens_read == len(PROMPT) - 1 + len(second.tokens) - 1 - found


@pytest.mark.parametrize(
    ("change", "options", "found"),
    [
        ({}, {}, True),
        ({"sampling": SamplingConfig(temperature=1.0)}, {}, True),
        ({"max_new_tokens": 2}, {}, True),
        ({"num_loops": 3}, {}, False),
        ({"exit_rule": KLExit()}, {}, False),
        ({"seed": 1}, {}, False),
        ({}, {"salt": "mine"}, False),
    ],
)
def test_what_a_prompts_pages_depend_on(change: Any, options: Any, found: bool) -> None:
    engine = make_engine()
    engine.add(make_request())
    run(engine)
    engine.add(make_request(**change), **options)
    run(engine)
    assert (engine.stats.num_prompt_tokens_found > 0) == found


def test_a_seed_matters_to_a_prompt_only_if_the_state_is_random() -> None:
    engine = make_engine("copied state, no coda")
    for seed in (0, 1):
        engine.add(make_request(seed=seed))
        run(engine)
    assert engine.stats.num_prompt_tokens_found == len(PROMPT) - 1


def test_without_reuse_every_prompt_is_read() -> None:
    engine = make_engine(reuse_prefixes=False)
    for _ in range(2):
        engine.add(make_request())
    run(engine)
    assert engine.stats.num_prompt_tokens_found == 0
    assert engine.stats.num_prompt_tokens_read == 2 * (len(PROMPT) - 1)


# --- pages ----------------------------------------------------------------------------------------


def test_out_of_pages_a_request_waits_and_gives_the_same() -> None:
    engine = make_engine(num_pages=14)
    requests = [make_request(seed=seed, exit_rule=RULE, max_new_tokens=12) for seed in range(3)]
    for request in requests:
        engine.add(request)
    events = run(engine)
    assert engine.stats.num_preempted > 0
    assert all(same(engine, request, events[n]) for n, request in enumerate(requests))


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    engine = make_engine(num_pages=6, max_len=30)
    engine.add(make_request(max_new_tokens=2))  # 8 + 2 columns
    with pytest.raises(ValueError, match=r"9 tokens and max_new_tokens=3.* at most 10 .*enlarge"):
        engine.add(make_request(max_new_tokens=3))
    assert len(run(engine)) == 1
    number = engine.add(make_request(max_new_tokens=None))  # as many as fit
    assert len(run(engine)[number]) == 2
    with pytest.raises(ValueError, match=r"12 tokens and max_new_tokens=1, which need 12 columns"):
        engine.add(make_request(tokens=[1] * 12, max_new_tokens=None))


def test_all_pages_come_back_after_aborts_at_random_instants() -> None:
    engine = make_engine(num_pages=24)
    abort_at_random(engine, num_aborts=60)
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, 23)
    assert stats.finished["abort"] >= 60


# --- order, time and ends -------------------------------------------------------------------------


def test_a_lower_priority_number_goes_first_and_waiting_makes_up_for_it() -> None:
    now = [0.0]
    engine = Engine(make_model("gqa"), replace(CONFIG, max_rows=1), clock=lambda: now[0])
    late = engine.add(make_request(max_new_tokens=1), priority=1)
    first = engine.add(make_request(max_new_tokens=1))
    now[0] = 10.5  # more than the ten seconds that a priority is worth
    last = engine.add(make_request(max_new_tokens=1))
    assert list(run(engine)) == [first, late, last]


def test_a_request_ends_at_its_deadline_wherever_it_is() -> None:
    now = [0.0]
    engine = Engine(make_model("gqa"), replace(CONFIG, max_rows=1), clock=lambda: now[0])
    running = engine.add(make_request(max_new_tokens=20), timeout=5)
    waiting = engine.add(make_request(), timeout=4.5)
    other = engine.add(make_request())
    events = [event for _ in range(40) for event in engine.step()]
    assert {event.id for event in events} == {running}
    now[0] = 5.0
    rest = run(engine)
    assert [event.finish_reason for event in rest[running]] == ["deadline"]
    assert [event.finish_reason for event in rest[waiting]] == ["deadline"]
    assert same(engine, make_request(), rest[other])


def test_stop_tokens_end_a_request_and_are_given_out() -> None:
    engine = make_engine()
    tokens = [new.token for new in alone(engine.model, CONFIG, make_request())]
    request = make_request(stop_tokens=[tokens[2]])
    number = engine.add(request)
    events = run(engine)[number]
    assert same(engine, request, events)
    assert events[-1].finish_reason == "stop" and len(events) <= 3


def test_a_request_that_diverges_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, leave = make_engine(), Runner.leave
    bad, good = engine.add(make_request(seed=1)), engine.add(make_request(seed=2))

    def diverge(runner: Runner, seats: list[int]) -> Any:
        logits, loops = leave(runner, seats)
        for job in engine._scheduler.running:
            if job.id == bad and len(job.new) == 2 and job.seat in seats:
                logits[seats.index(job.seat)] = torch.nan
        return logits, loops

    monkeypatch.setattr(Runner, "leave", diverge)
    events = run(engine)
    assert [event.finish_reason for event in events[bad]] == [None, None, "error"]
    assert "diverged" in events[bad][-1].error
    assert same(engine, make_request(seed=2), events[good])
    assert engine.stats.num_free_pages == engine.stats.num_pages


def test_settings_that_leave_no_choice_fail_alone() -> None:
    engine = make_engine()
    nothing = [(token, -float("inf")) for token in range(engine.model.config.vocab_size)]
    bad = [
        engine.add(make_request(sampling=SamplingConfig(**changes)))
        for changes in ({"logit_bias": nothing}, {"repetition_penalty": 5e-324})
    ]
    other = make_request(sampling=SamplingConfig(temperature=1.0), seed=2)
    good = engine.add(other)
    events = run(engine)
    for number in bad:
        assert [event.finish_reason for event in events[number]] == ["error"]
    assert "forbids every token" in events[bad[0]][0].error
    assert same(engine, other, events[good])
    assert engine.stats.num_free_pages == engine.stats.num_pages


@pytest.mark.parametrize("call", ["read", "enter", "advance", "leave"])
def test_a_failed_step_loses_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(hold_rows=2)
    requests = [
        make_request(sampling=SamplingConfig(temperature=1.0), seed=seed, exit_rule=RULE)
        for seed in range(3)
    ]
    for request in requests:
        engine.add(request)
    work, calls, events = getattr(Runner, call), [0], {}

    def fail_sometimes(runner: Runner, *args: Any) -> Any:
        calls[0] += 1
        result = work(runner, *args)
        if calls[0] in (3, 7):
            raise RuntimeError("no memory left")
        return result

    monkeypatch.setattr(Runner, call, fail_sometimes)
    failures = 0
    while not engine.is_idle:
        try:
            for event in engine.step():
                events.setdefault(event.id, []).append(event)
        except RuntimeError:
            failures += 1
    assert failures >= 1
    assert all(same(engine, request, events[n]) for n, request in enumerate(requests))


# --- streams --------------------------------------------------------------------------------------


def test_streams_are_read_in_turn_and_one_that_is_closed_aborts() -> None:
    engine = make_engine()
    requests = [make_request(seed=seed) for seed in range(3)]
    streams = [engine.stream(engine.add(request)) for request in requests]
    first = [next(stream) for stream in streams]
    streams[2].close()
    assert engine.stats.finished == {"abort": 1}
    rest = [list(stream) for stream in streams[:2]]
    for request, begin, end in zip(requests, first, rest, strict=False):
        assert same(engine, request, [begin, *end])
    assert not engine.abort(0)


def test_events_of_other_requests_wait_for_the_next_step() -> None:
    engine = make_engine()
    plain = engine.add(make_request(max_new_tokens=1))
    streamed = engine.add(make_request(seed=1))
    events = list(engine.stream(streamed))
    assert same(engine, make_request(seed=1), events)
    assert [event.id for event in engine.step()] == [plain] and engine.is_idle


def test_a_stream_of_a_request_that_has_ended_is_refused() -> None:
    engine = make_engine()
    number = engine.add(make_request(max_new_tokens=1))
    run(engine)
    with pytest.raises(ValueError, match="number is 0; it must be the number of a request that"):
        engine.stream(number)


# --- bad input ------------------------------------------------------------------------------------


@contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(ValueError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


def test_requests_are_refused_in_one_line() -> None:
    engine = make_engine()
    for request, message in (
        (make_request(tokens=[]), "at least one token long"),
        (make_request(tokens=[99]), r"token ids in 0..18"),
        (make_request(num_loops=6), "num_loops is 6; it must be at most 5"),
        (make_request(max_new_tokens=60), "the model has room for 64 in all"),
        (make_request(exit_rule=CumulativeThreshold(threshold=0.5)), "needs a halting head"),
        ("text", "request is 'text'; it must be a Request"),
    ):
        with refused(message):
            engine.add(request)
    with refused("priority is 0.5; it must be an integer"):
        engine.add(make_request(), priority=0.5)
    with refused("timeout is 'soon'; it must be a number of seconds"):
        engine.add(make_request(), timeout="soon")
    assert engine.is_idle and engine.stats.num_waiting == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_rows": 0}, "max_rows is 0"),
        ({"prefill_chunk": 3}, "prefill_chunk is 3; it must be a multiple of page_size=2"),
        ({"num_pages": 1}, "num_pages is 1; it must be an integer of at least 2"),
        ({"max_hold_ms": -1}, "max_hold_ms is -1"),
        ({"fair": "all"}, "fair is 'all'; it must be 'sum' or 'deep'"),
        ({"cache_layout": "last"}, "cache_layout is 'last'"),
        ({"batch_invariant": 1}, "batch_invariant is 1; it must be True or False"),
        ({"compiled": "no"}, "compiled is 'no'; it must be True or False"),
        ({"max_len": 65}, "max_len is 65; it must be at most 64, the max_seq_len of the model"),
        ({"num_pages": 10**12}, "a cache of 1000000000000 pages .* or num_pages"),
    ],
)
def test_configs_are_refused_in_one_line(changes: Any, message: str) -> None:
    with refused(message):
        make_engine(**changes)


def test_sizes_that_are_left_open_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gqa")
    engine = Engine(model, EngineConfig(max_rows=3))
    assert engine.capacity == (64, 4, 1 + 3 * 4)
    monkeypatch.setattr("openmythos.engine.engine.free_bytes", lambda: 1_000_000)
    monkeypatch.setattr("openmythos.plan.memory.free_bytes", lambda: 1_000_000)
    num_pages = Engine(model, EngineConfig(max_rows=1000)).capacity.num_pages
    pools = Engine(model, EngineConfig(max_rows=1000))._cache.pools
    assert 2 < num_pages < 1000 and sum(pool.nbytes for pool in pools) <= 500_000


def test_public_names() -> None:
    model: RecurrentDepthLM = make_model("mla")
    engine = om.Engine(model)
    number = engine.add(om.Request(tokens=[1, 2, 3], max_new_tokens=3, num_loops=2))
    tokens = [event.token for event in engine.stream(number)]
    assert tokens == om.generate(model, [[1, 2, 3]], max_new_tokens=3, num_loops=2).tokens[0]
    assert om.EngineConfig().max_rows == engine.config.max_rows


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_anywhere() -> None:
    with unchecked():
        (same, speed, *_) = run_on_device("cpu", ["walks"], [2], 2, compiled=False)
    assert same["coherence"]["requests"] > same["coherence"]["differ_beyond_rounding"] == 0
    assert speed["fixed"] > 0 and speed["dtype"] == "float32"
