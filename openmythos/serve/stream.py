"""Answers that come while they grow (server-sent events), and clients that hang up."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response

from openmythos.serve.error import APIError
from openmythos.serve.guard import Receive, Scope, Send, send_error

T = TypeVar("T")
DONE = "[DONE]"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class ClientGone(Exception):
    """The client has hung up."""


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of ``work``, which is cancelled if the client hangs up first.

    Call it after the body was read: what comes next is the end of the connection.

    Raises:
        ClientGone: The client has hung up.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events as data: objects in JSON, or (name, object) for events that have a name.

    The answer begins with the first event: an error before it, such as a full queue, has its own
    status; one after it is sent as data, because the status is gone by then. The source is closed
    whatever happens, also if the client hangs up while nothing is sent.
    """

    def __init__(self, events: AsyncIterator[Any], headers: dict[str, str], *, done: bool) -> None:
        self.events, self.done = events, done
        super().__init__(headers={**HEADERS, **headers})
        del self.headers["content-length"]  # it is not known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        with contextlib.suppress(ClientGone, OSError):  # nobody is there to be told
            await unless_gone(self._send_all(send), receive)

    async def _send_all(self, send: Send) -> None:
        begun = False
        try:
            async for event in self.events:
                if not begun:
                    head = {"type": "http.response.start", "status": 200}
                    await send({**head, "headers": self.raw_headers})
                begun = True
                await send(_data(event))
        except APIError as error:
            if not begun:
                await send_error(error, send)
                return
            await send(_data(("error", error.body) if not self.done else error.body))
        finally:
            await self.events.aclose()  # type: ignore[attr-defined]
        if self.done:
            await send(_part(f"data: {DONE}\n\n"))
        await send({"type": "http.response.body", "body": b""})


def _data(event: Any) -> dict[str, Any]:
    name, body = event if isinstance(event, tuple) else (None, event)
    head = "" if name is None else f"event: {name}\n"
    return _part(f"{head}data: {json.dumps(body, ensure_ascii=False)}\n\n")


def _part(text: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}
