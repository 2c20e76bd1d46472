"""Runs the application until it is told to end."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from openmythos.serve.app import make_app
from openmythos.serve.connection import Connection
from openmythos.serve.guard import MAX_BODY_BYTES, Guard
from openmythos.serve.metrics import Metrics
from openmythos.serve.served import ServedModel

GRACE = 30.0  # seconds until what still runs is cut short, once the server is told to end
FAREWELL = 10  # seconds more until connections are closed


class Server(uvicorn.Server):
    """Ends at SIGTERM or SIGINT: refuses new work, finishes what runs, and returns.

    Uvicorn's own would end the process by the signal, and its exit status would not be 0.
    """

    def __init__(
        self, config: uvicorn.Config, guard: Guard, models: Sequence[ServedModel], grace: float
    ) -> None:
        super().__init__(config)
        self.guard, self.models, self.grace = guard, models, grace

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs; what takes too long ends with what it has, as at a deadline."""

        def cut_short() -> None:
            for model in self.models:
                model.worker.cut_short()

        timer = asyncio.get_running_loop().call_later(self.grace, cut_short)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def end(self) -> None:
        """Begin to end; a second time: at once."""
        self.force_exit = self.should_exit
        self.should_exit = self.guard.ending = True


def web_config(guard: Guard, **settings: Any) -> uvicorn.Config:
    """How the web server runs; ``settings`` are its own."""
    ours: dict[str, Any] = {
        "http": Connection,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "lifespan": "off",
        "timeout_graceful_shutdown": int(GRACE) + FAREWELL,
    }
    return uvicorn.Config(guard, **ours | settings)


def serve(
    models: Sequence[ServedModel],
    metrics: Metrics,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> None:
    """Serve models until a signal ends it; their threads are started here."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("openmythos.serve").setLevel(logging.INFO)
    guard = Guard(make_app(models, metrics), keys=keys, max_body_bytes=max_body_bytes)
    config = web_config(guard, host=host, port=port)
    for model in models:
        model.worker.start()
    try:
        Server(config, guard, models, GRACE).run()
    finally:
        for model in models:
            model.worker.stop()
