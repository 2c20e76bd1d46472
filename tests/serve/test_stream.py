"""Streams, and clients that hang up while nothing is sent."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from openmythos.serve.error import APIError
from openmythos.serve.stream import ClientGone, EventStream, unless_gone


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


async def hangs_up() -> dict[str, Any]:
    await asyncio.sleep(0.01)
    return {"type": "http.disconnect"}


def test_work_is_cancelled_when_the_client_hangs_up() -> None:
    ended = []

    async def work() -> None:
        try:
            await never()
        finally:
            ended.append(True)

    with pytest.raises(ClientGone):
        asyncio.run(unless_gone(work(), hangs_up))
    assert ended == [True]


def test_work_that_ends_first_gives_its_result_or_error() -> None:
    async def work(fail: bool) -> int:
        if fail:
            raise KeyError("x")
        return 3

    assert asyncio.run(unless_gone(work(False), never)) == 3
    with pytest.raises(KeyError):
        asyncio.run(unless_gone(work(True), never))


def sent(events: AsyncIterator[Any], *, done: bool, receive: Any = never) -> str:
    parts: list[bytes] = []

    async def send(message: Any) -> None:
        parts.append(message.get("body", b""))

    stream = EventStream(events, {}, done=done)
    asyncio.run(stream({}, receive, send))
    return b"".join(parts).decode()


def test_the_form_of_events() -> None:
    async def events() -> AsyncIterator[Any]:
        yield {"a": "ü"}
        yield ("named", {"b": 1})

    assert sent(events(), done=True) == (
        'data: {"a": "ü"}\n\nevent: named\ndata: {"b": 1}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize("done", [True, False])
def test_an_error_after_the_first_byte_is_data(done: bool) -> None:
    async def events() -> AsyncIterator[Any]:
        yield {"a": 1}
        raise APIError(500, "broken")

    text = sent(events(), done=done)
    assert '"message": "broken"' in text and text.endswith("[DONE]\n\n") == done


def test_an_error_before_the_first_byte_has_its_status() -> None:
    messages: list[Any] = []

    async def events() -> AsyncIterator[Any]:
        raise APIError(429, "full", retry_after=1)
        yield

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(EventStream(events(), {}, done=True)({}, never, send))
    assert [message.get("status") for message in messages] == [429, None]
    assert (b"retry-after", b"1") in messages[0]["headers"] and b"full" in messages[1]["body"]


def test_a_source_is_closed_when_the_client_hangs_up() -> None:
    closed = []

    async def events() -> AsyncIterator[Any]:
        try:
            yield {"a": 1}
            await never()
        finally:
            closed.append(True)

    sent(events(), done=True, receive=hangs_up)
    assert closed == [True]
