"""The engine: many requests at once, each token with its own number of loops.

Every step runs one loop of every token that is looping, whatever loop each is at; a token that has
taken its loops makes room at once. Depth, exit rule, sampling and seed are each request's own, and
what a request gives depends on the request alone: not on the others, on when they came, or on what
was preempted.
"""

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from openmythos.config.schema import as_flag, as_integer, as_number, require
from openmythos.engine.paged_cache import PagedCache
from openmythos.engine.request import Request, room_for
from openmythos.engine.runner import Entry, Part, Runner
from openmythos.engine.sampling import (
    Logprobs,
    adjusted,
    row_generator,
    sample,
    token_logprobs,
)
from openmythos.engine.scheduler import Chunk, Fair, Job, Scheduler
from openmythos.model.cache import CacheLayout, PerLoop
from openmythos.model.exit import Fixed, Rule
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import build as native
from openmythos.plan.memory import free_bytes, require_memory

EndReason = Literal["stop", "length", "abort", "deadline", "error"]
ONE_DAY_MS = 86_400_000.0
PAGES_SHARE = 0.5  # of the free memory that an engine takes for pages at most, if it is not told


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine holds, and how it chooses what to do next.

    Attributes:
        max_rows: The most requests that are computed at once; others wait.
        max_len: The most tokens that one request may have read; None: the model's ``max_seq_len``.
        max_loops: The most loops that a request may ask for; None: the model's default.
        page_size: Tokens per page of the cache.
        num_pages: Pages of the cache; None: enough for all rows at full length or, if that is less,
            half of the free memory.
        cache_layout: Which loops the cache keeps; None: ``PerLoop``, all of them.
        prefill_chunk: Tokens of a prompt that are read at once, a multiple of ``page_size``.
        reuse_prefixes: Whether prompts that begin alike share what was read.
        hold_rows: The number of rows that tokens wait for between two tokens, where coda and
            prelude run, as long as others loop: more rows per call, but some wait for it. None: as
            is best for the sum of all by the costs that ``warm_up`` measures; without it they do
            not wait.
        max_hold_ms: The longest that a token waits there, in milliseconds.
        fair: ``"sum"``: as many tokens per second as possible, most of them of requests with few
            loops. ``"deep"``: those hold up requests with more loops only so far that these keep at
            least 0.8 of their speed in lockstep; it needs ``warm_up``, without which all tokens
            wait for each other, and ``max_hold_ms`` still bounds the wait.
        priority_s: Seconds of waiting that make up for a priority that is one worse.
        compiled: Whether to compile what runs for every token.
        batch_invariant: Whether a request's logits are the same to the last bit, whatever else is
            computed. Calls then have one size, so few requests cost as much as 16, and only whole
            chunks of prompts are shared.
    """

    max_rows: int = 32
    max_len: int | None = None
    max_loops: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    cache_layout: CacheLayout | None = None
    prefill_chunk: int = 256
    reuse_prefixes: bool = True
    hold_rows: int | None = None
    max_hold_ms: float = 50.0
    fair: Fair = "sum"
    priority_s: float = 10.0
    compiled: bool = False
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("max_rows", "page_size", "prefill_chunk"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name), 1))
        for name, least in (("max_len", 1), ("max_loops", 1), ("num_pages", 2), ("hold_rows", 1)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_integer(name, getattr(self, name), least))
        for name in ("max_hold_ms", "priority_s"):
            allowed = "a number of at least 0"
            value = as_number(name, getattr(self, name), allowed)
            require(value >= 0, name, value, allowed)
            object.__setattr__(self, name, value)
        require(
            self.fair in get_args(Fair), "fair", self.fair, " or ".join(map(repr, get_args(Fair)))
        )
        for name in ("reuse_prefixes", "compiled", "batch_invariant"):
            object.__setattr__(self, name, as_flag(name, getattr(self, name)))
        layout, made = self.cache_layout, "None or a layout, for example LastLoop()"
        require(layout is None or isinstance(layout, CacheLayout), "cache_layout", layout, made)
        whole = f"a multiple of page_size={self.page_size}"
        fits = self.prefill_chunk % self.page_size == 0
        require(fits, "prefill_chunk", self.prefill_chunk, whole)


@dataclass(frozen=True)
class Event:
    """Something that a request's client is told.

    Attributes:
        id: The request.
        token: The new token; None: the request ended without one.
        num_loops: The loops that it took.
        finish_reason: Why the request ended; None: it goes on.
        logprobs: If the request asks for them.
        error: What went wrong, if the reason is ``error``.
        num_cached: With the first token: how many of the prompt's were found in kept pages.
    """

    id: int
    token: int | None
    num_loops: int = 0
    finish_reason: EndReason | None = None
    logprobs: Logprobs | None = None
    error: str | None = None
    num_cached: int = 0


@dataclass(frozen=True)
class Stats:
    """What an engine has and has done since it began.

    ``rows_per_step`` is the mean number of rows in a call of the core. Prompt tokens were either
    read or found in kept pages; those of a preempted request are read again.
    """

    num_running: int
    num_waiting: int
    num_free_pages: int
    num_pages: int
    num_steps: int
    num_preempted: int
    num_new_tokens: int
    num_prompt_tokens_read: int
    num_prompt_tokens_found: int
    core_applications: int
    rows_per_step: float
    finished: dict[str, int]


@dataclass
class _Live:
    """A request in the engine."""

    request: Request
    rule: Rule
    job: Job
    generator: torch.Generator
    mailbox: deque[Event] | None = None


@dataclass
class _Counts:
    steps: int = 0
    core_calls: int = 0
    core_rows: int = 0
    new_tokens: int = 0
    prompt_read: int = 0
    prompt_found: int = 0
    finished: Counter[str] = field(default_factory=Counter)


class Engine:
    """Requests in, events out; call ``step`` until ``is_idle``. For one thread.

    If one of the model's calls fails, the step raises its error, and no request and no token is
    lost: running requests wait, and compute again what they had.

    Args:
        model: Its mode and settings must not change while the engine is used.
        config: See ``EngineConfig``.
        clock: Seconds, for deadlines and waiting times.

    Raises:
        ValueError: A cache that does not fit, or a layout that the model cannot use.
    """

    def __init__(
        self,
        model: RecurrentDepthLM,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self._clock = model, clock
        self.config = config = EngineConfig() if config is None else config
        self.capacity = capacity = _capacity(model, config)
        native.require_compiler("compiled", config.compiled)
        weight = model.embed.weight
        self._cache = PagedCache(
            model.config,
            num_pages=capacity.num_pages,
            page_size=config.page_size,
            max_loops=capacity.max_loops,
            layout=config.cache_layout,
            dtype=weight.dtype,
            device=weight.device,
            batch_invariant=config.batch_invariant,
        )
        self._scheduler = Scheduler(
            self._cache.pages,
            num_seats=config.max_rows,
            prefill_chunk=config.prefill_chunk,
            exact=self._cache.layout.exact and not config.batch_invariant,
            hold=config.hold_rows,
            max_hold=config.max_hold_ms / 1000,
            fair=config.fair,
            reuse=config.reuse_prefixes,
        )
        self._runner = Runner(
            model,
            self._cache,
            config.max_rows,
            capacity.max_len,
            compiled=config.compiled,
            batch_invariant=config.batch_invariant,
        )
        self._modules = list(model.modules())
        self._live: dict[int, _Live] = {}
        self._ids = itertools.count()
        self._events: list[Event] = []
        self._counts = _Counts()

    @classmethod
    def fitting(
        cls,
        model: RecurrentDepthLM,
        requests: Sequence[Request],
        *,
        cache_layout: CacheLayout | None = None,
        compiled: bool = False,
    ) -> "Engine":
        """An engine with just enough room for these requests, which are still to be added.

        It gives what ``generate`` gives for them, prompts being read at once where that matters.
        Tokens wait for each other as in its batches: nothing depends on how long calls take.

        Raises:
            ValueError: A request that the model cannot serve, or a cache that does not fit.
        """
        room, size = room_for(model.config, requests), EngineConfig.page_size
        exact = cache_layout is None or cache_layout.exact
        # Room to spare, a page each: jobs are admitted as long as the running ones can go on.
        per_row = -(-room.max_len // size) + 1
        config = EngineConfig(
            max_rows=len(requests),
            max_len=room.max_len,
            max_loops=room.max_loops,
            num_pages=1 + len(requests) * per_row,
            cache_layout=cache_layout,
            prefill_chunk=EngineConfig.prefill_chunk if exact else size * per_row,
            hold_rows=len(requests),
            max_hold_ms=ONE_DAY_MS,
            compiled=compiled,
        )
        return cls(model, config)

    def warm_up(self) -> None:
        """Compile what is to be compiled, and measure what calls cost; takes seconds to minutes.

        Without it the calls are compiled when they come, and tokens do not wait for each other.
        Call it while no request is running.
        """
        with inference(self.model, self._modules):
            self._scheduler.costs = self._runner.measure()

    # --- requests ---------------------------------------------------------------------------------

    def add(
        self,
        request: Request,
        *,
        priority: int = 0,
        timeout: float | None = None,
        salt: str = "",
    ) -> int:
        """Take a request; its events come from later steps. Returns its number.

        Requests with the same prompt, depth, rule and salt share the reading of it: several samples
        of one prompt are several requests that differ in ``sample_idx``.

        Args:
            request: What to continue, and how.
            priority: Requests with a lower one go first; waiting makes up for a higher one.
            timeout: Seconds after which it ends, with what it has; None: never.
            salt: Requests with different salts share nothing, so that nobody can tell from the time
                to the first token what others have asked.

        Raises:
            ValueError: A request that the model or the cache could never serve.
        """
        require(isinstance(request, Request), "request", request, "a Request")
        request.check(self.model.config, max_loops=self.capacity.max_loops)
        num_new = self._num_new(request)
        priority, now = as_integer("priority", priority), self._clock()
        deadline = float("inf")
        if timeout is not None:
            deadline = now + as_number("timeout", timeout, "a number of seconds, or None")
        number = next(self._ids)
        rule = Fixed() if request.exit_rule is None else request.exit_rule
        job = Job(
            id=number,
            prompt=tuple(request.tokens),
            num_new=num_new,
            depth=request.depth(self.model.config),
            settings=self._settings(request, rule, salt),
            may_stop=not isinstance(rule, Fixed),
            order=(now + priority * self.config.priority_s, number),
            deadline=deadline,
        )
        generator = row_generator(request.seed, request.sample_idx)
        self._live[number] = _Live(request, rule, job, generator)
        self._scheduler.add(job)
        return number

    def abort(self, number: int) -> bool:
        """End a request; the last event tells it. False: it has ended before."""
        if number not in self._live:
            return False
        self._scheduler.remove(self._live[number].job)
        self._end(number, "abort")
        return True

    def stream(self, number: int) -> Iterator[Event]:
        """The events of a request from now on, until it ends; steps the engine while there is none.

        They are given to this stream only, those of other requests to their streams or to the next
        ``step``. Several streams may be read in turn. One that is closed early aborts its request.
        """
        require(
            number in self._live, "number", number, "the number of a request that has not ended"
        )
        mailbox = self._live[number].mailbox = deque()
        return self._read(number, mailbox)

    @property
    def is_idle(self) -> bool:
        """Whether all requests have ended and all events were given out."""
        return not self._live and not self._events

    @property
    def stats(self) -> Stats:
        """What the engine has and has done."""
        counts, scheduler = self._counts, self._scheduler
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_pages=self._cache.pages.num_free,
            num_pages=self._cache.num_pages - 1,
            num_steps=counts.steps,
            num_preempted=scheduler.num_preempted,
            num_new_tokens=counts.new_tokens,
            num_prompt_tokens_read=counts.prompt_read,
            num_prompt_tokens_found=counts.prompt_found,
            core_applications=self._runner.core_applications,
            rows_per_step=counts.core_rows / max(1, counts.core_calls),
            finished=dict(counts.finished),
        )

    # --- a step -----------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Read chunks of prompts, decode and encode tokens, run a loop; return the new events."""
        self._step()
        events, self._events = self._events, []
        return events

    def _step(self) -> None:
        try:
            with inference(self.model, self._modules):
                self._work()
        except BaseException:
            self._scheduler.copies.clear()
            self._scheduler.preempt(self._scheduler.running)
            raise

    def _work(self) -> None:
        scheduler, runner, now = self._scheduler, self._runner, self._clock()
        begun, only_looped = time.perf_counter(), True
        self._counts.steps += 1
        for job in scheduler.expire(now):
            self._end(job.id, "deadline")
        for job in scheduler.admit(now):
            if not job.new:
                self._counts.prompt_found += job.num_cached
        chunks = scheduler.chunks()
        runner.read([self._part(chunk) for chunk in chunks])
        for chunk in chunks:
            self._counts.prompt_read += chunk.stop - chunk.start
            scheduler.has_read(chunk, now)
        if scheduler.boundary_is_due(now):
            only_looped, began = False, time.perf_counter()
            if leaving := scheduler.at("exited"):
                self._decode(leaving, now)
            if entering := scheduler.enter(now):
                if scheduler.copies:
                    self._cache.copy(scheduler.copies)
                    scheduler.copies.clear()
                runner.enter([self._entry(job) for job in entering])
            if leaving and len(leaving) == len(entering):
                scheduler.has_crossed(len(leaving), time.perf_counter() - began)
        looping = {job.seat: job for job in scheduler.at("core")}
        if looping:
            self._counts.core_calls += 1
            self._counts.core_rows += len(looping)
            called = time.perf_counter()
            ended = runner.advance(list(looping))
            in_call = time.perf_counter() - called
            scheduler.has_looped(looping.values(), [looping[seat] for seat in ended], now)
            if only_looped and not chunks:
                scheduler.has_stepped(time.perf_counter() - begun - in_call)

    def _part(self, chunk: Chunk) -> Part:
        job, start, stop = chunk
        seed = self._live[job.id].request.seed
        return Part(job.text[start:stop], start, tuple(job.pages), job.depth, seed)

    def _entry(self, job: Job) -> Entry:
        live = self._live[job.id]
        where = job.seat, job.token, job.num_read, tuple(job.pages)
        return Entry(*where, job.depth, live.rule, live.request.seed, job.recorded_loops)

    def _decode(self, jobs: list[Job], now: float) -> None:
        """End the jobs' tokens, and sample the next ones where they are not known yet."""
        logits, loops = self._runner.leave([job.seat for job in jobs])
        finite = logits.amax(dim=-1).isfinite().tolist()
        new = []
        for place, job in enumerate(jobs):
            if not finite[place]:
                self._scheduler.remove(job)
                self._end(job.id, "error", "the logits are not finite; the model has diverged")
            elif job.recorded_loops is not None:
                self._scheduler.has_decoded(job, loops[place], None, now)
            else:
                new.append(place)
        if not new:
            return
        lives = [self._live[jobs[place].id] for place in new]
        draw = _draw_each if self.config.batch_invariant else _draw
        for place, live, drawn in zip(new, lives, draw(logits[new], lives), strict=True):
            if isinstance(drawn, ValueError):
                self._scheduler.remove(live.job)
                self._end(live.job.id, "error", str(drawn))
                continue
            sampled, live.generator = drawn
            token = live.request.new_token(len(live.job.new), sampled)
            self._scheduler.has_decoded(live.job, loops[place], token, now)
            self._tell(live, token, loops[place], logits[place])

    def _tell(self, live: _Live, token: int, loops: int, logits: Float[Tensor, "V"]) -> None:
        """Give out a new token, and end the request if it was its last."""
        request, job = live.request, live.job
        report = None
        if request.logprobs is not None:
            report = token_logprobs(logits, token, request.logprobs)
        reason: EndReason | None = "length" if len(job.new) == job.num_new else None
        reason = "stop" if token in request.stop_tokens else reason
        self._counts.new_tokens += 1
        found = job.num_cached if len(job.new) == 1 else 0
        self._give(live, Event(job.id, token, loops, reason, report, num_cached=found))
        if reason is not None:
            self._scheduler.remove(job)
            self._counts.finished[reason] += 1
            del self._live[job.id]

    def _end(self, number: int, reason: EndReason, error: str | None = None) -> None:
        """Give out the end of a request that the scheduler has removed."""
        self._counts.finished[reason] += 1
        self._give(self._live.pop(number), Event(number, None, 0, reason, None, error))

    def _give(self, live: _Live, event: Event) -> None:
        (self._events if live.mailbox is None else live.mailbox).append(event)

    def _read(self, number: int, mailbox: deque[Event]) -> Iterator[Event]:
        try:
            while mailbox or number in self._live:
                if mailbox:
                    yield mailbox.popleft()
                else:
                    self._step()
        finally:
            self.abort(number)

    # --- what fits --------------------------------------------------------------------------------

    def _num_new(self, request: Request) -> int:
        """The most tokens that a request may sample."""
        num_given, pages = len(request.tokens), self.capacity.num_pages - 1
        columns = min(self.capacity.max_len, pages * self.config.page_size)
        room = columns + 1 - num_given  # the last new token is not read
        num_new = request.budget(max(1, min(room, self.model.config.max_seq_len - num_given)))
        if num_new > room:
            raise ValueError(
                f"the request has {num_given} tokens and max_new_tokens={num_new}, which need "
                f"{num_given - 1 + num_new} columns of the cache, and a request has at most "
                f"{columns} (max_len={self.capacity.max_len}, {pages} pages of "
                f"{self.config.page_size}); shorten one of them, or enlarge the cache"
            )
        return num_new

    def _settings(self, request: Request, rule: Rule, salt: str) -> tuple[object, ...]:
        """All that the keys and values of a prompt depend on besides its tokens, and the salt."""
        config = self.config
        seed = request.seed if self.model.config.state_init.is_random else None
        depth = request.depth(self.model.config)
        return depth, rule, seed, self._cache.layout, config.prefill_chunk, salt


class Capacity(NamedTuple):
    """The sizes of an engine, where the model or this machine decides what the config left open."""

    max_len: int
    max_loops: int
    num_pages: int


def _capacity(model: RecurrentDepthLM, config: EngineConfig) -> Capacity:
    longest = model.config.max_seq_len if config.max_len is None else config.max_len
    allowed = f"at most {model.config.max_seq_len}, the max_seq_len of the model"
    require(longest <= model.config.max_seq_len, "max_len", longest, allowed)
    loops = model.config.num_loops if config.max_loops is None else config.max_loops
    weight, layout = model.embed.weight, config.cache_layout or PerLoop()
    size = PagedCache.page_bytes(model.config, config.page_size, loops, layout, weight.dtype)
    pages, free = config.num_pages, _free_bytes(weight.device)
    if pages is None:
        pages = 1 + config.max_rows * -(-longest // config.page_size)
        if free is not None:
            pages = max(2, min(pages, int(PAGES_SHARE * free / size)))
    if weight.device.type == "cpu":
        what = f"a cache of {pages} pages of {config.page_size} tokens and {loops} loops"
        require_memory(pages * size, what, "lower num_loops or max_loops, max_len or num_pages")
    return Capacity(longest, loops, pages)


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes() if device.type == "cpu" else None


def _draw(
    logits: Float[Tensor, "N V"], lives: list[_Live]
) -> list[tuple[int, torch.Generator] | ValueError]:
    """Each row's next token and its generator afterwards; or why there is none.

    Settings that leave a row nothing to choose from are that request's own failure.
    """
    num_new = [len(live.job.new) for live in lives]
    settings = [
        live.request.sampling_after(count) for live, count in zip(lives, num_new, strict=True)
    ]
    drawn = [
        live.generator.clone_state() if each.temperature else live.generator
        for live, each in zip(lives, settings, strict=True)
    ]
    texts = [
        live.job.text if each.adjusts else () for live, each in zip(lives, settings, strict=True)
    ]
    try:
        weighed = adjusted(logits, settings, texts, num_new)
        tokens = sample(weighed, settings, drawn).tolist()
    except ValueError as error:
        return [error] if len(lives) == 1 else _draw_each(logits, lives)
    return list(zip(tokens, drawn, strict=True))


def _draw_each(
    logits: Float[Tensor, "N V"], lives: list[_Live]
) -> list[tuple[int, torch.Generator] | ValueError]:
    """As ``_draw``, each row by itself."""
    rows = zip(logits.split(1), lives, strict=True)
    return [drawn for row, live in rows for drawn in _draw(row, [live])]
