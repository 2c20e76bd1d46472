"""Which request does what next: seats, pages and order, decided from counters alone. No tensors.

A job goes through these stages, the last three for each of its tokens:

    waiting    it has no seat and no pages, before it begins or after it was preempted
    prefill    its prompt is read in chunks, except for the last token
    ready      the next token is to be encoded
    core       the token loops
    exited     the token has taken its loops; it is to be decoded
"""

import bisect
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, NamedTuple

from openmythos.engine.call_cost import CallCosts, Ends, ends_after
from openmythos.engine.page_pool import PagePool

MEMORY = 32  # tokens of a job whose loops tell how soon the next one will stop
DEEP_SHARE = 0.85  # of its speed in lockstep that a deep job is planned to keep; 0.8 is promised
FORGET = 8  # tokens after which they are looked up again
Fair = Literal["sum", "deep"]
Stage = Literal["waiting", "prefill", "ready", "core", "exited"]


@dataclass(eq=False, kw_only=True)
class Job:
    """A request in the engine: what it wants, what was done, and what it holds.

    Attributes:
        id: The request's number.
        prompt: Its tokens.
        num_new: The most tokens to sample.
        depth: The most loops per token.
        settings: All that the keys and values of prompts depend on, besides the tokens.
        order: Jobs with smaller ones go first.
        may_stop: Whether an exit rule can stop a token before it has taken all loops.
        deadline: When it ends at the latest, on the clock of ``now``, in seconds.
        new: The tokens sampled so far.
        loops: The loops that each of them took.
        num_read: Number of tokens whose keys and values are in its pages.
        pages: Its pages in the order of its text.
        seat: Its place among the rows; -1 without one.
        since: When it reached its stage, in seconds.
        num_cached: Number of prompt tokens that were found in pages when it began.
        num_looped: The loops that its token has run.
        charged: Seconds that shallower jobs have cost its token, with ``fair="deep"``.
    """

    id: int
    prompt: tuple[int, ...]
    num_new: int
    depth: int
    settings: Hashable = ()
    order: tuple[float, int] = (0.0, 0)
    may_stop: bool = False
    deadline: float = math.inf
    stage: Stage = "waiting"
    new: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    num_read: int = 0
    pages: list[int] = field(default_factory=list)
    seat: int = -1
    since: float = 0.0
    num_cached: int = 0
    num_looped: int = 0
    charged: float = 0.0
    _seen: tuple[int, ...] = ()  # the latest tokens' loops in order, when there were ``_num_seen``
    _num_seen: int = 0
    _mean: float = 0.0

    @property
    def text(self) -> tuple[int, ...]:
        """The prompt and the tokens sampled so far."""
        return (*self.prompt, *self.new)

    @property
    def token(self) -> int:
        """The next token to decode."""
        place = self.num_read - len(self.prompt)
        return self.prompt[place] if place < 0 else self.new[place]

    @property
    def recorded_loops(self) -> int | None:
        """The loops that the next token took before the job was preempted; None: it is new."""
        place = self.num_read + 1 - len(self.prompt)
        return self.loops[place] if place < len(self.loops) else None

    @property
    def ends(self) -> Ends:
        """When its token will end; by an exit rule as the job's latest tokens did."""
        known = self.recorded_loops
        if known is None and not self.may_stop:
            known = self.depth
        if known is not None:
            return ends_after((known,), self.num_looped, known)
        return ends_after(self._latest, self.num_looped, self.depth)

    @property
    def mean_loops(self) -> float:
        """The loops that its tokens take on average; by an exit rule as the latest did."""
        return self._mean if self.may_stop and self._latest else float(self.depth)

    @property
    def _latest(self) -> tuple[int, ...]:
        """The loops of the latest tokens in order, looked up now and then."""
        if not self._num_seen <= len(self.loops) < self._num_seen + FORGET:
            self._num_seen, self._seen = len(self.loops), tuple(sorted(self.loops[-MEMORY:]))
            self._mean = sum(self._seen) / max(1, len(self._seen))
        return self._seen


class Chunk(NamedTuple):
    """Tokens ``start`` to ``stop`` of a job's text, which are read at once."""

    job: Job
    start: int
    stop: int


class Scheduler:
    """The jobs of an engine and their order.

    Jobs are admitted in order, as long as there are seats and pages, and none is overtaken because
    it needs many. If the pages run out later, the last job in order is preempted: it gives its
    pages back, waits, and computes again what it had, each token with the loops that it took.

    Args:
        pages: The pages of the cache.
        num_seats: Number of rows.
        prefill_chunk: Number of tokens of a prompt that are read at once; chunks end at multiples
            of it, whatever the load, and one step reads about as many tokens in all.
        exact: Whether what a token gives does not depend on where its chunk begins and ends: the
            cache layout keeps every loop, and last bits do not matter. If not, only whole chunks
            are found in kept pages, and what was decoded is decoded again after a preemption.
        hold: The number of rows that tokens wait for at the boundary between two tokens, where coda
            and prelude run, as long as other rows loop. None: decided by ``costs``, once the engine
            has measured them; until then they do not wait.
        max_hold: The longest that a token waits there, in seconds.
        fair: Whether the sum of all tokens counts, or deep jobs are held up little by shallower
            ones; decided by ``costs`` too, without which all jobs then wait for each other.
        reuse: Whether jobs with the same beginning and settings share pages.
    """

    def __init__(
        self,
        pages: PagePool,
        *,
        num_seats: int,
        prefill_chunk: int,
        exact: bool = True,
        hold: int | None = None,
        max_hold: float = math.inf,
        fair: Fair = "sum",
        reuse: bool = True,
    ) -> None:
        self.pages, self.prefill_chunk, self.exact = pages, prefill_chunk, exact
        self.hold, self.max_hold, self.reuse = hold, max_hold, reuse
        self.fair = fair
        self.waiting: list[Job] = []  # in order
        self.running: list[Job] = []
        self.copies: list[tuple[int, int]] = []  # pages to copy before anything is read or written
        self.costs: CallCosts | None = None
        self.step_seconds = 10e-6  # of a step besides the model's calls, as the latest ones were
        # How many times as long as its measured calls a crossing takes: tokens are drawn and given
        # out, and its weights have left the caches.
        self.slower = 1.5
        self.num_preempted = 0
        self._num_to_run, self._num_together = 0, 1  # loops before tokens cross, and how many do
        self._seats = list(range(num_seats - 1, -1, -1))

    def num_pages(self, num_tokens: int) -> int:
        """Number of pages that hold so many tokens."""
        return -(-num_tokens // self.pages.page_size)

    def add(self, job: Job) -> None:
        """Let a job wait for its turn."""
        bisect.insort(self.waiting, job, key=attrgetter("order"))

    def remove(self, job: Job) -> None:
        """End a job, wherever it is; its pages and its seat are free."""
        if job in self.waiting:
            self.waiting.remove(job)
        else:
            self._release(job)

    def expire(self, now: float) -> list[Job]:
        """Remove and return the jobs whose deadline has passed."""
        late = [job for job in (*self.waiting, *self.running) if job.deadline <= now]
        for job in late:
            self.remove(job)
        return late

    def at(self, stage: Stage) -> list[Job]:
        """The running jobs at a stage, in order."""
        return sorted((j for j in self.running if j.stage == stage), key=attrgetter("order"))

    # --- waiting -> prefill or ready --------------------------------------------------------------

    def admit(self, now: float) -> list[Job]:
        """Give waiting jobs a seat and pages for what they are to read; return those admitted."""
        admitted = []
        for job in list(self.waiting):
            if not self._seats:
                break
            twin = self._twin(job)
            if twin is not None and twin.stage == "prefill":
                continue  # it is reading the very same
            if not self._give_pages(job, twin):
                break
            self.waiting.remove(job)
            self.running.append(job)
            job.seat = self._seats.pop()
            self._move(job, "ready" if job.num_read >= self._target(job) else "prefill", now)
            admitted.append(job)
        return admitted

    def _twin(self, job: Job) -> Job | None:
        """A running job whose prompt is the same and was read in the same way."""
        if len(job.prompt) < 2 or job.new or not self.reuse:
            return None  # there is nothing to read before the first new token, or more than that
        twins = (
            other
            for other in self.running
            if other.prompt == job.prompt and other.settings == job.settings
        )
        return next(twins, None)

    def _give_pages(self, job: Job, twin: Job | None) -> bool:
        """Find or take the pages of what the job reads first; False: too few are free."""
        size, target = self.pages.page_size, self._target(job)
        if twin is not None:
            num_found = len(job.prompt) - 1
            found = twin.pages[: self.num_pages(num_found)]
            self.pages.share(found)
        else:
            found = self.pages.find(job.settings, job.text[:target]) if self.reuse else []
            num_found = len(found) * size
            if not self.exact:
                num_found -= num_found % self.prefill_chunk
                self.pages.drop(found[num_found // size :])
                del found[num_found // size :]
        # For the token after the target too, and one for each running job: it may soon need one.
        # A shared page that is not full will be copied.
        needed = self.num_pages(target + 1) - num_found // size
        if needed + len(self.running) > self.pages.num_free:
            self.pages.drop(found)
            return False
        more = self.num_pages(target) - len(found)
        job.pages = [*found, *(self.pages.take() for _ in range(more))]
        job.num_read = num_found
        if not job.new:
            job.num_cached = num_found
        return True

    def _target(self, job: Job) -> int:
        """Number of tokens that are read as a prompt.

        After a preemption these include tokens that were sampled, if all have taken all loops.
        """
        whole = self.exact and all(loops == job.depth for loops in job.loops)
        return len(job.prompt) - 1 + (len(job.new) if whole else 0)

    # --- prefill -> ready -------------------------------------------------------------------------

    def chunks(self) -> list[Chunk]:
        """The chunks to read in this step: one, or several that are not longer together."""
        found: list[Chunk] = []
        left = self.prefill_chunk
        for job in self.at("prefill"):
            start = job.num_read
            end = (start // self.prefill_chunk + 1) * self.prefill_chunk
            chunk = Chunk(job, start, min(end, self._target(job)))
            left -= chunk.stop - chunk.start
            if found and left < 0:
                break
            found.append(chunk)
        return found

    def has_read(self, chunk: Chunk, now: float) -> None:
        """A chunk's keys and values are in the job's pages."""
        job = chunk.job
        job.num_read = chunk.stop
        if self.reuse:
            end = chunk.stop if self.exact else chunk.stop - chunk.stop % self.prefill_chunk
            self.pages.keep(job.settings, job.text[:end], job.pages)
        if chunk.stop == self._target(job):
            self._move(job, "ready", now)

    # --- ready -> core -> exited -> ready ---------------------------------------------------------

    def boundary_is_due(self, now: float) -> bool:
        """Whether the tokens at the boundary go on, or are held back for more to come."""
        held = [job for job in self.running if job.stage in ("exited", "ready")]
        looping = [job for job in self.running if job.stage == "core"]
        if not held or not looping:
            return bool(held)
        if now - min(job.since for job in held) >= self.max_hold:
            return True
        if self.hold is not None:
            return len(held) >= self.hold
        if self.costs is None:
            return self.fair == "sum"
        if self.fair == "deep" and max(j.depth for j in held) > max(j.depth for j in looping):
            return True  # it does not wait for shallower ones
        if self._num_to_run > 0 or len(held) < self._num_together:
            return False
        return self.fair == "sum" or self._is_affordable(held, looping, self.costs)

    def has_stepped(self, seconds: float) -> None:
        """A step that only ran a loop took so long besides the model's call."""
        self.step_seconds *= _towards(seconds, self.step_seconds)

    def has_crossed(self, num_rows: int, seconds: float) -> None:
        """So many tokens have crossed the boundary in so many seconds."""
        if self.costs is not None:
            self.slower *= _towards(seconds / self.costs.crossing(num_rows), self.slower)

    def _is_affordable(self, held: list[Job], looping: list[Job], costs: CallCosts) -> bool:
        """Whether those held may go on without holding up deeper jobs too much.

        What it costs is charged to the deeper jobs' tokens. A token may take ``1 / DEEP_SHARE`` of
        the time that it would take if all jobs waited for each other.
        """
        depth = max(job.depth for job in held)
        deeper = [job for job in looping if job.depth > depth]
        extra = costs.crossing(len(held)) + depth * (
            costs.loop(len(held) + len(looping)) - costs.loop(len(looping))
        )
        depths = [job.depth for job in self.running]
        together = costs.crossing(len(depths)) + sum(
            costs.loop(sum(each > loop for each in depths)) for loop in range(max(depths))
        )
        if any(job.charged + extra > (1 / DEEP_SHARE - 1) * together for job in deeper):
            return False
        for job in deeper:
            job.charged += extra
        return True

    def enter(self, now: float) -> list[Job]:
        """Move the ready jobs to the core, each with a page of its own for the next token."""
        entered = []
        for job in self.at("ready"):
            if job.stage == "ready" and self._claim_page(job):  # a job before it may have preempted
                self._move(job, "core", now)
                job.num_looped, job.charged = 0, 0.0
                entered.append(job)
        if self.costs is not None and self.hold is None:
            looping = [job for job in self.running if job.stage == "core"]
            ends, loops = [job.ends for job in looping], [job.mean_loops for job in looping]
            self._num_to_run, self._num_together = self.costs.loops_between(
                ends, loops, self.step_seconds, self.slower
            )
        return [job for job in entered if job.stage == "core"]

    def has_looped(self, jobs: Iterable[Job], ended: Iterable[Job], now: float) -> None:
        """The jobs' tokens have run a loop, which was the last of those that ``ended``."""
        self._num_to_run -= 1
        for job in jobs:
            job.num_looped += 1
        for job in ended:
            self._move(job, "exited", now)

    def has_decoded(self, job: Job, loops: int, token: int | None, now: float) -> None:
        """The job's token was decoded; ``token`` is the next one, None if it is known already."""
        job.num_read += 1
        if token is not None:
            job.new.append(token)
            job.loops.append(loops)
        self._move(job, "ready", now)

    def preempt(self, jobs: Iterable[Job]) -> None:
        """Let running jobs wait again; they lose their pages and keep their tokens and loops."""
        for job in list(jobs):
            self._release(job)
            job.num_read = 0
            self.num_preempted += 1
            self.add(job)

    def _claim_page(self, job: Job) -> bool:
        """Have the page of the job's next token, for itself; False: the job was preempted."""
        index = job.num_read // self.pages.page_size
        if index < len(job.pages) and not self.pages.is_shared(job.pages[index]):
            return True
        while not self.pages.num_free:
            last = max(self.running, key=attrgetter("order"))
            self.preempt([last])
            if last is job:
                return False
        page = self.pages.take()
        if index < len(job.pages):
            self.copies.append((job.pages[index], page))
            self.pages.drop([job.pages[index]])
            job.pages[index] = page
        else:
            job.pages.append(page)
        return True

    def _release(self, job: Job) -> None:
        self.running.remove(job)
        self.pages.drop(job.pages)
        self._seats.append(job.seat)
        job.pages, job.seat, job.stage = [], -1, "waiting"

    def _move(self, job: Job, stage: Stage, now: float) -> None:
        job.stage, job.since = stage, now


def _towards(value: float, median: float) -> float:
    """A factor that follows the median of values: a few that took far too long do not count."""
    return 1.1 if value > median else 1 / 1.1
