"""A server on a free port of this machine, for tests."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
import uvicorn

from openmythos import generate
from openmythos.config import GQAConfig, ModelConfig, SwiGLUConfig
from openmythos.engine.engine import Engine, EngineConfig
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.serve.app import make_app
from openmythos.serve.connection import Connection
from openmythos.serve.guard import Guard
from openmythos.serve.metrics import Metrics
from openmythos.serve.served import Codec, ServedModel
from openmythos.serve.server import web_config
from openmythos.serve.worker import EngineThread
from openmythos.tokenizer import byte_tokenizer


def small_model(seed: int = 0, **changes: Any) -> RecurrentDepthLM:
    """A model of bytes whose weights are all random, so that it does not ignore its cache."""
    fields = {
        "vocab_size": byte_tokenizer().vocab_size,
        "d_model": 16,
        "num_prelude_layers": 1,
        "num_core_layers": 1,
        "num_coda_layers": 1,
        "num_loops": 4,
        "max_seq_len": 128,
        "attention": GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        "feed_forward": SwiGLUConfig(d_ff=32),
    } | changes
    model = RecurrentDepthLM(ModelConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@dataclass
class Running:
    """A server that runs."""

    url: str
    served: list[ServedModel]
    guard: Guard
    server: uvicorn.Server
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def connect(self) -> socket.socket:
        """A connection of bytes, for clients that behave badly."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)

    @property
    def engine(self) -> Engine:
        return self.served[0].worker.engine

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Wait until nothing runs and all pages are free, or fail."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.engine.stats
            if stats.num_running == stats.num_waiting == self.served[0].worker.num_tickets == 0:
                return
            time.sleep(0.01)
        raise AssertionError(f"after {seconds} s: {self.engine.stats}")


@contextlib.contextmanager
def running(
    models: dict[str, tuple[RecurrentDepthLM, Codec]] | None = None,
    *,
    keys: Sequence[str] = (),
    max_waiting: int = 256,
    max_body_bytes: int = 1 << 20,
    body_seconds: float = 60.0,
    connection: type[Connection] = Connection,
    timeout: float | None = None,
    **engine: Any,
) -> Iterator[Running]:
    """Serve models, by default one of bytes under the name ``small``."""
    models = models or {"small": (small_model(), byte_tokenizer())}
    metrics, served = Metrics(), []
    for name, (model, codec) in models.items():
        config = EngineConfig(**{"max_rows": 8, "max_loops": 2 * model.config.num_loops} | engine)
        made = Engine(model, config)
        measured = metrics.of(name, lambda made=made: made.stats)
        worker = EngineThread(made, measured, max_waiting=max_waiting)
        served.append(ServedModel(name, model, codec, worker, timeout=timeout))
        worker.start()
    limits: dict[str, Any] = {"max_body_bytes": max_body_bytes, "body_seconds": body_seconds}
    guard = Guard(make_app(served, metrics), keys=keys, **limits)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        server = uvicorn.Server(web_config(guard, http=connection))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        here = Running(f"http://127.0.0.1:{port}", served, guard, server)
        try:
            yield here
        finally:
            here.client.close()
            server.should_exit = True
            thread.join()
            for one in served:
                one.worker.stop()


def alone(prompt: str, **settings: Any) -> list[int]:
    """The tokens that ``generate`` gives for a prompt, alone."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode_prompt(prompt)
    return generate(small_model(), [ids], stop_tokens=tokenizer.end_ids, **settings).tokens[0]
