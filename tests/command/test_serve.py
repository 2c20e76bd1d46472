"""The server as a user starts it: a process that is told to end while it answers."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from openmythos.checkpoint.save import save_pretrained
from openmythos.eval.puzzle import PuzzleCodec
from openmythos.interop.hub import zoo_names
from openmythos.serve import server
from openmythos.serve.served import ServedModel
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.command.conftest import Invoke, refused
from tests.serve.running import small_model


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.slow
def test_a_server_that_is_told_to_end_finishes_what_runs(tmp_path: Path) -> None:
    folder = save_pretrained(small_model(), tmp_path / "small", byte_tokenizer())
    port = free_port()
    command = [sys.executable, "-m", "openmythos", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--max-rows", "2"], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    answers: list[dict[str, Any]] = []
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            try:
                assert httpx.get(f"{url}/ready").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.05)
        body = {"model": "small", "prompt": "a", "max_tokens": 90, "ignore_eos": True}

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120).json())

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        # All five are there: one that comes after the signal is refused.
        busy = [f'openmythos_requests_{n}{{model="small"}} ' for n in ("running", "waiting")]
        said = ""
        while f"{busy[0]}2" not in said or f"{busy[1]}3" not in said:
            time.sleep(0.01)
            said = httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    counts = [answer["usage"]["completion_tokens"] for answer in answers]
    assert counts == [90] * 5
    assert "listening on http://127.0.0.1" in errors and "Traceback" not in errors


def test_without_a_path_the_models_that_ship_are_served(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[ServedModel] = []
    monkeypatch.setattr(server, "serve", lambda models, *_, **__: served.extend(models))
    invoke("serve", "--max-rows", 2)
    names = [f"zoo:{model.name}" for model in served]
    assert names[0] == "zoo:walks" and sorted(names) == zoo_names()
    for model in served:
        assert isinstance(model.codec, Tokenizer if model.name == "text" else PuzzleCodec)
    assert len({id(model.worker.engine) for model in served}) == len(served)


def test_options_reach_the_engine(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = save_pretrained(small_model(), tmp_path / "small", byte_tokenizer()), []
    monkeypatch.setattr(
        "openmythos.serve.server.serve", lambda models, *_, **__: given.extend(models)
    )
    invoke("serve", folder, "--batch-invariant", "--max-rows", 3)
    config = given[0].worker.engine.config
    assert config.batch_invariant and config.max_rows == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent"], "absent"),
        (["a/small", "b/small"], "same name"),
        (["zoo:absent"], "no model 'zoo:absent' ships"),
        (["zoo:walks", "a/walks"], "same name"),
        (["absent", "--api-key-file", "empty.txt"], "holds no key"),
        (["absent", "--host", "999.1.1.1"], "absent"),
    ],
)
def test_mistakes_are_one_line(
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    assert said in refused(invoke, "serve", *arguments)
