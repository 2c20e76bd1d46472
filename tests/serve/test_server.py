"""The server's end; a whole one ends in tests/command/test_serve.py."""

import uvicorn

from openmythos.serve.guard import Guard
from openmythos.serve.server import Server


async def nothing(*_: object) -> None:
    """An application that is never called."""


def test_the_second_signal_ends_at_once() -> None:
    guard = Guard(nothing)
    server = Server(uvicorn.Config(guard), guard, [], 1.0)
    server.end()
    assert server.should_exit and guard.ending and not server.force_exit
    server.end()
    assert server.force_exit
