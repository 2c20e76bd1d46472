"""Clients that are slow, and such as close one half of their connection."""

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from openmythos.serve.connection import Connection
from openmythos.serve.stream import EventStream
from tests.serve.running import running
from tests.serve.test_guard import post


class Impatient(Connection):
    head_seconds = 0.2
    read_seconds = 0.2


def closed(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nhost: a\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\n\r\nGET /he",
    ],
)
def test_a_head_that_never_ends(sent: bytes) -> None:
    with running(connection=Impatient) as server, server.connect() as connection:
        connection.sendall(sent)
        assert closed(connection).count(b"200 OK") == sent.count(b"\r\n\r\n")
        assert server.client.get("/health").status_code == 200


def test_the_rest_of_a_refused_body_that_never_ends() -> None:
    small = running(connection=Impatient, max_body_bytes=10)
    with small as server, server.connect() as connection:
        connection.sendall(post(1000) + b"x" * 100)
        assert b" 413 " in closed(connection)


def test_a_client_that_does_not_read_its_answer_holds_nothing() -> None:
    ended = threading.Event()

    async def numbers() -> AsyncIterator[Any]:
        try:
            for number in itertools.count():
                await asyncio.sleep(0)
                yield {"number": number, "padding": "x" * 100_000}
        finally:
            ended.set()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await EventStream(numbers(), {}, done=True)(scope, receive, send)

    with running(connection=Impatient) as server, server.connect() as connection:
        server.guard.app = endless
        connection.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert ended.wait(30)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_half_has_hung_up(stream: bool) -> None:
    fields = {"model": "small", "prompt": "a", "max_tokens": 120, "ignore_eos": True}
    body = json.dumps({**fields, "stream": stream}).encode()
    with running() as server, server.connect() as connection:
        connection.sendall(post(len(body)) + body)
        connection.shutdown(socket.SHUT_WR)
        closed(connection)
        server.wait_until_idle()
        stats = server.engine.stats
        assert stats.num_free_pages == stats.num_pages
        assert stats.finished.get("length", 0) == 0
