"""What stands before every request, as plain ASGI: number, key, size of the body, the end.

Starlette's own base class for this breaks streams and cancellation.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from openmythos.serve.error import APIError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("openmythos.serve")
MAX_ID_CHARACTERS = 128
MAX_BODY_BYTES = 4 << 20
TOO_LONG = "the body has more than {} bytes"


class Guard:
    """Checks requests before the application sees them.

    Args:
        app: The application.
        keys: Keys of which a request to ``/v1`` must have one; none: no key is needed.
        max_body_bytes: The most bytes of a body.
        body_seconds: The longest that a body may take to come.

    Attributes:
        ending: Whether new work is refused because the server ends.
        num_open: Requests that have not been answered to their end.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Sequence[str] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
        body_seconds: float = 60.0,
    ) -> None:
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds
        self._keys = [key.encode() for key in keys]
        self.ending = False
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        usable = given.isprintable() and 0 < len(given) <= MAX_ID_CHARACTERS
        number = given if usable else uuid.uuid4().hex
        started, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), _header(number)]}
            await send(message)

        self.num_open += 1
        try:
            refused = self._refused(scope["path"], headers)
            if refused is not None:
                await send_error(refused, answer)
            else:
                limited = _Limited(receive, self.max_body_bytes, self.body_seconds)
                await self.app(scope, limited, answer)
        finally:
            self.num_open -= 1
            seconds = round(time.monotonic() - started, 4)
            line = {"id": number, "method": scope["method"], "path": scope["path"]}
            log.info(json.dumps({**line, "status": status, "seconds": seconds}))

    def _refused(self, path: str, headers: MutableMapping[bytes, bytes]) -> APIError | None:
        guarded = path.startswith("/v1/") or path in ("/v1", "/tokenize", "/detokenize")
        if guarded and self._keys:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            known = [hmac.compare_digest(key.strip(), right) for right in self._keys]
            if kind.lower() != b"bearer" or not any(known):
                said = "give a valid key: Authorization: Bearer KEY"
                return APIError(401, said, code="invalid_api_key")
        if guarded and self.ending:
            return APIError(503, "the server is ending", code="ending", retry_after=5)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return APIError(413, TOO_LONG.format(self.max_body_bytes))
        return None


class _Limited:
    """``receive``, up to a number of bytes and seconds."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self._left, self._most = receive, most, most
        self._seconds, self._whole = seconds, False
        self._end = asyncio.get_running_loop().time() + seconds

    async def __call__(self) -> Message:
        try:
            async with asyncio.timeout_at(None if self._whole else self._end):
                message = await self._receive()
        except TimeoutError:
            said = f"the body took longer than {self._seconds} seconds"
            raise HTTPException(408, said, {"connection": "close"}) from None
        if message["type"] == "http.request":
            self._whole = not message.get("more_body", False)
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise HTTPException(413, TOO_LONG.format(self._most))
        return message


def _header(number: str) -> tuple[bytes, bytes]:
    return b"x-request-id", number.encode("latin-1")


async def send_error(error: APIError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    pairs = [(k.encode(), v.encode()) for k, v in {**headers, **error.headers}.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
