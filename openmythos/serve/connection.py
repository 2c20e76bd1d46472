"""The connection of a client that is too slow: it is closed, so that it holds nothing for ever.

Uvicorn limits only how long a connection may rest between two requests. The time that a body may
take is limited in ``guard``, where it has an answer of its own.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """An HTTP/1.1 connection that closes if its client takes too long.

    Attributes:
        head_seconds: For the head of a request, from the connection or its first byte on; and for
            the rest of a body that was refused.
        read_seconds: For making room, once more of an answer waits than the buffers hold.
    """

    head_seconds: ClassVar[float] = 10.0
    read_seconds: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes; they may complete a head."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that was refused."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._read = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._read = _stop(self._read)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._head, self._read = _stop(self._head), _stop(self._read)

    def _watch(self) -> None:
        """Let the time run while no request is answered, from its first instant on."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _stop(self._head)
        elif self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer; returns that there is none any more."""
    if timer is not None:
        timer.cancel()
    return None
