"""Runs the application until it is told to end."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator, Sequence

import uvicorn

from openmythos.serve.app import make_app
from openmythos.serve.guard import MAX_BODY_BYTES, Guard
from openmythos.serve.metrics import Metrics
from openmythos.serve.served import ServedModel

GRACE = 30  # seconds that running requests have to finish, once the server is told to end


class Server(uvicorn.Server):
    """Ends at SIGTERM or SIGINT: refuses new work, finishes what runs, and returns.

    Uvicorn's own would end the process by the signal, and its exit status would not be 0.
    """

    def __init__(self, config: uvicorn.Config, guard: Guard) -> None:
        super().__init__(config)
        self.guard = guard

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

    def end(self) -> None:
        """Begin to end; a second time: at once."""
        self.force_exit = self.should_exit
        self.should_exit = self.guard.ending = True


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
    config = uvicorn.Config(
        guard,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    for model in models:
        model.worker.start()
    try:
        Server(config, guard).run()
    finally:
        for model in models:
            model.worker.stop()
