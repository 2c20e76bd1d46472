"""Random schedules of requests, and whether each request gives what it gives alone.

``make stress-engine`` runs a thousand of them, and 500 aborts; ``--first`` is the number of the
first. The tests run some. Every weight is random: with zero output projections, as in a new model,
the cache would not matter. Each runs in fp64, and in fp32: with ``batch_invariant``, where no bit
may differ from the request alone in such an engine, and without, where a token may differ from the
reference's if two are as likely.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from openmythos.config import (
    ACTConfig,
    CopyInitConfig,
    DepthAttentionConfig,
    ModelConfig,
    NormalInitConfig,
    PonderNetConfig,
    SinusoidalLoopConfig,
    SwiGLUConfig,
    UniversalACTConfig,
    WeightLoRAConfig,
)
from openmythos.engine.engine import Engine, EngineConfig, Event
from openmythos.engine.reference import NewToken, Session
from openmythos.engine.request import Request
from openmythos.engine.sampling import Logprobs, SamplingConfig
from openmythos.model.cache import EveryK, FirstLoop, LastLoop, PerLoop
from openmythos.model.exit import (
    AccelerationExit,
    ArgmaxStableExit,
    CumulativeThreshold,
    EntropyKLExit,
    KLExit,
    LatentDifferenceExit,
    Rule,
)
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import GQA, MLA, MOE, random_model

MAX_LOOPS, VOCAB, TOLERANCE = 5, 19, 1e-9
MARGIN = 1e-4  # of the two most likely tokens' log-probabilities, in fp32
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"loop_embedding": SinusoidalLoopConfig(num_channels=4), "num_core_layers": 2},
    "mla": {"attention": MLA, "loop_adapter": WeightLoRAConfig(rank=2, num_loops=3)},
    "moe": {"core_feed_forward": MOE, "halting": PonderNetConfig(bias_init=-1.0)},
    "act": {"halting": ACTConfig(bias_init=-1.0)},
    "universal act, moe, mla": {
        "halting": UniversalACTConfig(bias_init=-1.0),
        "attention": MLA,
        "core_feed_forward": MOE,
    },
    "depth attention": {"depth_attention": DepthAttentionConfig(num_recent_loops=2)},
    "copied state, no coda": {"state_init": CopyInitConfig(), "num_coda_layers": 0},
}
LAYOUTS = [PerLoop(), PerLoop(), EveryK(2), EveryK(3), LastLoop(), FirstLoop()]
RULES: list[Rule | None] = [
    None,
    KLExit(threshold=0.05),
    EntropyKLExit(kl=0.1, entropy=2.5),
    LatentDifferenceExit(threshold=0.5),
    AccelerationExit(threshold=0.5, patience=1),
    ArgmaxStableExit(patience=1),
    KLExit(threshold=0.2, check_every=2),
    LatentDifferenceExit(threshold=0.9, check_every=3),
]
SAMPLING = [
    SamplingConfig(),
    SamplingConfig(temperature=0.8),
    SamplingConfig(temperature=1.2, top_k=7, top_p=0.9),
]


def make_model(kind: str, dtype: torch.dtype = torch.float64) -> RecurrentDepthLM:
    """A model of some thousand parameters, all random."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 12,
        "num_prelude_layers": 1,
        "num_core_layers": 1,
        "num_coda_layers": 1,
        "num_loops": 4,
        "max_seq_len": 64,
        "attention": GQA,
        "feed_forward": SwiGLUConfig(d_ff=16),
        "state_init": NormalInitConfig(),
    }
    return random_model(ModelConfig(**fields | KINDS[kind]), dtype=dtype)


@dataclass(frozen=True)
class Arrival:
    """A request, when it comes, and after how many steps more its client hangs up (None: never)."""

    step: int
    request: Request
    priority: int = 0
    salt: str = ""
    patience: int | None = None


@dataclass
class Schedule:
    """A model, an engine and its requests; ``follow_ups`` tokens come after some answers."""

    kind: str
    config: EngineConfig
    arrivals: list[Arrival]
    follow_ups: list[list[int]] = field(default_factory=list)


def draw_schedule(number: int) -> Schedule:
    """The schedule of this number."""
    draw = random.Random(number)
    kind = draw.choice(list(KINDS))
    layouts = LAYOUTS[:1] if kind == "depth attention" else LAYOUTS
    page = draw.choice([1, 2, 3, 4])
    config = EngineConfig(
        max_rows=draw.randint(1, 6),
        max_len=30,
        max_loops=MAX_LOOPS,
        page_size=page,
        num_pages=1 + -(-30 // page) + draw.choice([0, 0, 2, 60]),
        cache_layout=draw.choice(layouts),
        prefill_chunk=page * draw.randint(1, 4),
        reuse_prefixes=draw.random() < 0.8,
        hold_rows=draw.choice([1, 1, 2, 4]),
        max_hold_ms=draw.choice([0, 1, 1e6]),
    )
    rules = RULES if not hasattr(KINDS[kind].get("halting"), "bias_init") else [
        *RULES, CumulativeThreshold(threshold=0.6)
    ]  # fmt: skip
    common = [draw.randrange(VOCAB) for _ in range(16)]
    arrivals: list[Arrival] = []
    for _ in range(draw.randint(2, 4)):
        own = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 6))]
        num_new = draw.randint(1, 7)
        num_forced = draw.choice([0, 0, draw.randint(0, num_new)])
        request = Request(
            tokens=common[: draw.choice([0, 0, 5, 11, 16])] + own,
            max_new_tokens=num_new,
            forced_tokens=[draw.randrange(VOCAB) for _ in range(num_forced)],
            num_loops=draw.randint(1, MAX_LOOPS),
            exit_rule=draw.choice(rules),
            sampling=draw.choice(SAMPLING),
            stop_tokens=[draw.randrange(VOCAB)] if draw.random() < 0.3 else [],
            seed=draw.choice([0, 0, 3, 2**64 - 1]),
            logprobs=3,
        )
        step = draw.choice([0, 0, draw.randrange(40)])
        for sample_idx in range(draw.choice([1, 1, 1, 2])):
            patience = draw.randrange(60) if draw.random() < 0.15 else None
            again = replace(request, sample_idx=sample_idx)
            salt = draw.choice(["", "", "", "other"])
            arrivals.append(Arrival(step, again, draw.choice([0, 0, 1, -1]), salt, patience))
    follow_ups = [
        [draw.randrange(VOCAB) for _ in range(draw.randint(1, 3))]
        for _ in range(draw.choice([0, 1, 1]))
    ]
    return Schedule(kind, config, arrivals, follow_ups)


class Recorder(Engine):
    """An engine that keeps the logits of every token, by request."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logits: dict[int, list[torch.Tensor]] = {}

    def _tell(self, live: Any, token: int, loops: int, logits: torch.Tensor) -> None:
        self.logits.setdefault(live.job.id, []).append(logits.clone())
        super()._tell(live, token, loops, logits)


@dataclass
class Played:
    """What an engine gave: requests and events by number, and its state at the end."""

    requests: dict[int, Request]
    events: dict[int, list[Event]]
    engine: Recorder


def play(model: RecurrentDepthLM, schedule: Schedule, most_steps: int = 20_000) -> Played:
    """Run a schedule until all its requests have ended."""
    engine = Recorder(model, schedule.config)
    requests: dict[int, Request] = {}
    events: dict[int, list[Event]] = {}
    hang_ups: dict[int, int] = {}
    coming = sorted(schedule.arrivals, key=lambda arrival: arrival.step)
    follow_ups, step = list(schedule.follow_ups), 0

    def add(request: Request, **options: Any) -> int:
        number = engine.add(request, **options)
        requests[number], events[number] = request, []
        return number

    while coming or not engine.is_idle:
        while coming and coming[0].step <= step:
            arrival = coming.pop(0)
            number = add(arrival.request, priority=arrival.priority, salt=arrival.salt)
            if arrival.patience is not None:
                hang_ups[step + arrival.patience] = number
        if step in hang_ups:
            engine.abort(hang_ups[step])
        for event in engine.step():
            events[event.id].append(event)
            answered = event.finish_reason in ("stop", "length")
            if answered and follow_ups:  # a second turn, after an answer with early exits
                request = requests[event.id]
                answer = [each.token for each in events[event.id]]
                text = [*request.tokens, *answer, *follow_ups.pop()]
                if len(text) < schedule.config.max_len:
                    most = min(4, 31 - len(text))
                    add(replace(request, tokens=text, max_new_tokens=most, forced_tokens=()))
        step += 1
        if step > most_steps:
            raise RuntimeError(f"{len(requests)} requests do not end: {engine.stats}")
    return Played(requests, events, engine)


def alone(model: RecurrentDepthLM, config: EngineConfig, request: Request) -> list[NewToken]:
    """What the reference generates for this request, with a cache of its own."""
    session = Session.fitting(
        model, [request], max_loops=MAX_LOOPS, cache_layout=config.cache_layout
    )
    return list(session.stream([request], prefill_chunk=config.prefill_chunk))


def differences(events: list[Event], tokens: list[NewToken]) -> Iterator[str]:
    """How a request's events differ from what it gives alone; an aborted one gives less."""
    given = [event for event in events if event.token is not None]
    ends = [event.finish_reason for event in events if event.finish_reason is not None]
    if ends not in (["abort"], [tokens[-1].finish_reason]):
        yield f"ended with {ends}, alone with {tokens[-1].finish_reason}"
    if len(given) != len(tokens) and ends != ["abort"]:
        yield f"{len(given)} tokens, alone {len(tokens)}"
    for place, (event, new) in enumerate(zip(given, tokens, strict=False)):
        pairs = (("token", event.token, new.token), ("loops", event.num_loops, new.num_loops))
        for name, here, there in pairs:
            if here != there:
                yield f"{name} {place} is {here}, alone {there}"
        gap = _gap(event.logprobs, new.logprobs)
        if not gap <= TOLERANCE:
            yield f"log-probabilities of token {place} differ by {gap:.1e}"


def _gap(here: Logprobs | None, there: Logprobs | None) -> float:
    assert here is not None and there is not None
    gaps = [abs(here.chosen - there.chosen)]
    gaps += [abs(a - b) for (_, a), (_, b) in zip(here.top, there.top, strict=True)]
    return max(gaps)


def check(schedule: Schedule) -> tuple[list[str], Played]:
    """Run a schedule; every difference in words, and what was played."""
    model = make_model(schedule.kind)
    played = play(model, schedule)
    found = []
    for number, request in played.requests.items():
        tokens = alone(model, schedule.config, request)
        found += [
            f"request {number}: {each}" for each in differences(played.events[number], tokens)
        ]
    stats = played.engine.stats
    if stats.num_free_pages != stats.num_pages or stats.num_running or stats.num_waiting:
        found.append(f"not all came back: {stats}")
    return found, played


def check_bits(schedule: Schedule, batch_invariant: bool = True) -> tuple[list[str], Played]:
    """Whether in fp32 no bit of a request's logits depends on what else is in the engine."""
    config = replace(schedule.config, batch_invariant=batch_invariant)
    model = make_model(schedule.kind, torch.float32)
    played, found = play(model, replace(schedule, config=config)), []
    for number, request in played.requests.items():
        lonely = play(model, Schedule(schedule.kind, config, [Arrival(0, request)]))
        here, there = played.engine.logits.get(number, []), lonely.engine.logits[0]
        if len(here) > len(there) or (
            len(here) < len(there) and played.events[number][-1].finish_reason != "abort"
        ):
            found.append(f"request {number}: {len(here)} tokens, alone {len(there)}")
        pairs = zip(here, there, played.events[number], lonely.events[0], strict=False)
        for place, (logits, others, event, other) in enumerate(pairs):
            if not torch.equal(logits, others) or event.num_loops != other.num_loops:
                gap = (logits - others).abs().max()
                loops = f"{event.num_loops} loops, alone {other.num_loops}"
                found.append(f"request {number}: logits {place} differ by {gap:.1e}, {loops}")
                break
    return found, played


def check_ties(schedule: Schedule) -> tuple[list[str], Counter[str]]:
    """Whether in fp32 a greedy token differs from the reference's only between two as likely.

    Where sums of another order decide that a rule stops a token elsewhere, what follows differs
    too; that is counted, as such differences of tokens are.
    """
    arrivals = [
        replace(each, request=replace(each.request, sampling=SamplingConfig()))
        for each in schedule.arrivals
    ]
    model = make_model(schedule.kind, torch.float32)
    played = play(model, replace(schedule, arrivals=arrivals))
    found, counts = [], Counter[str]()
    for number, request in played.requests.items():
        tokens = alone(model, schedule.config, request)
        counts["requests"] += 1
        for event, new in zip(played.events[number], tokens, strict=False):
            if event.token is None:
                break
            if event.num_loops != new.num_loops:
                counts["other loops"] += 1
                break
            if event.token != new.token:
                (_, best), (_, second), *_ = new.logprobs.top
                counts["other tokens"] += 1
                if not best - second < MARGIN:
                    found.append(f"request {number}: another token at a margin of {best - second}")
                break
    return found, counts


def abort_at_random(engine: Engine, num_aborts: int, seed: int = 0) -> None:
    """Let requests come and hang up at random instants, and at last all of them."""
    draw = random.Random(seed)
    aborted, numbers = 0, []
    while aborted < num_aborts:
        if draw.random() < 0.5:
            text = [draw.randrange(2) for _ in range(draw.randint(1, 9))]
            depth = draw.randint(1, 3)
            rule = LatentDifferenceExit(threshold=0.5)
            request = Request(tokens=text, max_new_tokens=6, num_loops=depth, exit_rule=rule)
            numbers.append(engine.add(request))
        if numbers and draw.random() < 0.4:
            aborted += engine.abort(numbers.pop(draw.randrange(len(numbers))))
        engine.step()
    for number in numbers:
        engine.abort(number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, bad, counts = time.monotonic(), 0, Counter[str]()
    engine = Engine(make_model("gqa"), EngineConfig(max_rows=4, page_size=2, num_pages=24))
    abort_at_random(engine, num_aborts=500)
    stats = engine.stats
    print(f"{stats.num_free_pages} of 23 pages are free after {stats.finished['abort']} aborts")
    bad += stats.num_free_pages != 23
    for number in range(options.first, options.first + options.schedules):
        schedule = draw_schedule(number)
        found, played = check(schedule)
        bits, _ = check_bits(schedule)
        ties, in_fp32 = check_ties(schedule)
        found += [f"batch-invariant: {each}" for each in bits] + [f"fp32: {each}" for each in ties]
        bad += bool(found)
        for each in found[:5]:
            print(f"schedule {number}: {each}", flush=True)
        done = number - options.first + 1
        if done in (1, options.schedules) or done % 25 == 0:
            took = f"{time.monotonic() - begun:.0f} s"
            print(f"{done} of {options.schedules} schedules, {bad} bad, {took}", flush=True)
        stats = played.engine.stats
        counts.update(stats.finished)
        counts["tokens"] += stats.num_new_tokens
        counts["preempted"] += stats.num_preempted
        counts["prompt tokens found"] += stats.num_prompt_tokens_found
        counts["early exits"] += sum(
            0 < event.num_loops < played.requests[event.id].num_loops
            for events in played.events.values()
            for event in events
        )
        counts.update({f"in fp32: {name}": number for name, number in in_fp32.items()})
    print(f"{options.schedules} schedules, {bad} with differences, {dict(counts)}, "
          f"{time.monotonic() - begun:.0f} s")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
