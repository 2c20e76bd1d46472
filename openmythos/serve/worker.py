"""The thread that an engine runs in, and the bridge from it to asyncio.

An engine is for one thread. Everything that touches it is sent there as a call; what it gives out
comes back as events of a ticket, through one wake-up of the event loop per step.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from openmythos.engine.engine import EndReason, Engine, Event
from openmythos.engine.request import Request
from openmythos.serve.error import APIError
from openmythos.serve.metrics import ModelMetrics

T = TypeVar("T")
MAX_FAILURES = 3  # steps in a row that may fail before the engine counts as dead
RETRY_AFTER = 1  # seconds


class Ticket:
    """A request that the engine has taken: its events, in order.

    There are never more events than the request may have tokens, and one: nothing is dropped, and
    a slow client holds up nobody.
    """

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop, num_tokens: int) -> None:
        self.number, self.loop, self.num_tokens = number, loop, num_tokens
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.begun = self.last = time.monotonic()
        self.num_new, self.num_cached = 0, 0
        self.closed = False


class _Call(NamedTuple):
    run: Callable[[], Any]
    result: "Future[Any]"


class EngineThread:
    """Runs an engine in a thread of its own.

    Args:
        engine: No other thread may use it from here on.
        metrics: What is measured.
        max_waiting: The most requests that may wait beyond those that are computed.

    Attributes:
        failure: What ended the thread; None while it is well.
    """

    def __init__(self, engine: Engine, metrics: ModelMetrics, *, max_waiting: int = 256) -> None:
        self.engine, self.metrics = engine, metrics
        self.capacity = engine.config.max_rows + max_waiting
        self.failure: BaseException | None = None
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._num_tickets = 0  # in the event loop's thread: tickets given and not yet returned
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def num_tickets(self) -> int:
        """Requests that have been taken and not closed."""
        return self._num_tickets

    @property
    def is_alive(self) -> bool:
        """Whether the thread takes requests."""
        return self._thread.is_alive() and self.failure is None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step; wait for it."""
        self._calls.put(None)
        if self._thread.is_alive():
            self._thread.join()

    async def open(
        self, requests: Sequence[Request], *, priority: int, timeout: float | None, salt: str
    ) -> list[Ticket]:
        """Give requests to the engine, all of them or none.

        Raises:
            APIError: The queue is full, a request cannot be served, or the engine is dead.
        """
        count = len(requests)
        if count > self.capacity:  # it would not help to come again
            raise APIError(400, f"{count} answers are asked for; give up to {self.capacity}")
        if self._num_tickets + count > self.capacity:
            said = f"{self._num_tickets} requests run or wait; there may be {self.capacity}"
            raise APIError(429, said, code="queue_full", retry_after=RETRY_AFTER)
        loop = asyncio.get_running_loop()
        taken: list[Ticket] = []

        def add() -> list[Ticket]:
            for request in requests:
                number = self.engine.add(request, priority=priority, timeout=timeout, salt=salt)
                taken.append(Ticket(number, loop, len(request.tokens)))
                self._tickets[number] = taken[-1]
            return taken

        self._num_tickets += count
        try:
            return await self.call(add)
        except BaseException as error:
            self._num_tickets -= count
            # Some may have been taken before one was refused; and if the client has hung up, the
            # engine may still take all of them.
            self._ask(lambda: self._forget(taken, "abort"))
            if isinstance(error, ValueError):
                raise APIError(400, str(error)) from None
            raise

    def close(self, ticket: Ticket, reason: EndReason) -> None:
        """Return a ticket; a request that has not ended does so, for this reason."""
        if not ticket.closed:
            ticket.closed = True
            self._num_tickets -= 1
            self._ask(lambda: self._forget([ticket], reason))

    def cut_short(self) -> None:
        """End all requests with what they have."""
        self._ask(lambda: [self.engine.abort(number) for number in self._tickets])

    async def call(self, run: Callable[[], T]) -> T:
        """Run something between two steps of the engine, and return what it returns.

        Raises:
            APIError: The engine is dead.
        """
        result: T = await asyncio.shield(asyncio.wrap_future(self._ask(run)))
        return result

    def _ask(self, run: Callable[[], Any]) -> "Future[Any]":
        """Let the thread run something, after all that it was asked for before."""
        call = _Call(run, Future())
        self._calls.put(call)
        if not self.is_alive:  # nobody takes it, or it ended before it saw the call
            self._refuse_calls()
        return call.result

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        try:
            while self._take_calls():
                if self.engine.is_idle:
                    continue
                try:
                    events = self.engine.step()
                    failures = 0
                except Exception:
                    failures += 1
                    if failures == MAX_FAILURES:
                        raise
                else:
                    self._deliver(events)
        except BaseException as error:
            self.failure = error
            self._deliver(
                [
                    Event(number, None, finish_reason="error", error=f"the engine failed: {error}")
                    for number in self._tickets
                ]
            )
        finally:
            if self.failure is None:
                self.failure = RuntimeError("the server is ending")
            self._refuse_calls()

    def _take_calls(self) -> bool:
        """Do what was asked, and wait for that if there is nothing else; False: end."""
        block = self.engine.is_idle
        while True:
            try:
                call = self._calls.get(block=block)
            except queue.Empty:
                return True
            if call is None:
                return False
            block = False
            if call.result.set_running_or_notify_cancel():
                try:
                    call.result.set_result(call.run())
                except BaseException as error:
                    call.result.set_exception(error)

    def _refuse_calls(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            if call is not None and call.result.set_running_or_notify_cancel():
                call.result.set_exception(dead(self.failure))

    def _forget(self, tickets: Sequence[Ticket], reason: EndReason) -> None:
        for ticket in tickets:
            if self._tickets.pop(ticket.number, None) is not None:
                self.engine.abort(ticket.number)
                self._measure_end(ticket, reason, time.monotonic())

    def _deliver(self, events: list[Event]) -> None:
        """Hand events to their tickets: one wake-up of each event loop."""
        now, batches = time.monotonic(), dict[asyncio.AbstractEventLoop, deque[Any]]()
        for event in events:
            ticket = self._tickets.get(event.id)
            if ticket is None:
                continue
            self._measure(ticket, event, now)
            if event.finish_reason is not None:
                del self._tickets[event.id]
            batches.setdefault(ticket.loop, deque()).append((ticket, event))
        for loop, batch in batches.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, batch)

    def _measure(self, ticket: Ticket, event: Event, now: float) -> None:
        metrics = self.metrics
        if event.token is not None:
            ticket.num_new += 1
            first = ticket.num_new == 1
            timer = metrics.first_token if first else metrics.inter_token
            timer.observe(now - (ticket.begun if first else ticket.last))
            ticket.last = now
            metrics.new_tokens.inc()
            metrics.loops.observe(event.num_loops)
            if first:
                ticket.num_cached = event.num_cached
                metrics.prompt_tokens.inc(ticket.num_tokens)
        if event.finish_reason is not None:
            self._measure_end(ticket, event.finish_reason, now)

    def _measure_end(self, ticket: Ticket, reason: EndReason, now: float) -> None:
        self.metrics.finished[reason].inc()
        self.metrics.whole.observe(now - ticket.begun)


def dead(failure: BaseException | None) -> APIError:
    """The answer of a server whose engine has ended."""
    return APIError(503, f"the engine has ended: {failure}", code="engine_dead")


def _put_all(batch: deque[tuple[Ticket, Event]]) -> None:
    for ticket, event in batch:
        ticket.events.put_nowait(event)
