"""The engine's thread: clients that hang up, a full queue, an engine that fails or dies."""

import socket
import threading
import time
from typing import Any

import httpx
import pytest
import torch

from openmythos.tokenizer import byte_tokenizer
from tests.serve.running import Running, running, small_model

LONG: dict[str, Any] = {"model": "small", "max_tokens": 100, "ignore_eos": True, "num_loops": 8}
SHORT = {**LONG, "max_tokens": 25}


def hang_up(server: Running, body: bytes) -> None:
    """Send a request and close the connection before an answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        end = time.monotonic() + 30
        while server.engine.stats.num_running == 0 and time.monotonic() < end:
            time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages(stream: bool) -> None:
    with running(reuse_prefixes=False) as server:
        request = httpx.Request("POST", server.url, json={**LONG, "prompt": "a", "stream": stream})
        for _ in range(3):
            hang_up(server, request.content)
            server.wait_until_idle()
        stats = server.engine.stats
        assert stats.num_free_pages == stats.num_pages
        assert stats.finished.get("abort", 0) + stats.finished.get("length", 0) == 3


def test_a_full_queue_says_when_to_come_again() -> None:
    with running(max_rows=1, max_waiting=1) as server:
        answers: list[httpx.Response] = []

        def ask(stream: bool) -> None:
            answers.append(server.post("/v1/completions", **SHORT, prompt="a", stream=stream))

        threads = [threading.Thread(target=ask, args=[i % 2 == 0]) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = [answer.status_code for answer in answers]
        assert codes.count(200) >= 2 and set(codes) <= {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["type"] == "rate_limit_error"
        server.wait_until_idle()
        assert server.post("/v1/completions", **SHORT, prompt="a").status_code == 200


def test_numbers_that_are_none_end_their_request_alone() -> None:
    model = small_model(tie_embeddings=False)
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    with running({"small": (model, byte_tokenizer())}) as server:
        bad = server.post("/v1/completions", model="small", prompt=[7], max_tokens=3)
        good = server.post("/v1/completions", model="small", prompt=[9, 8], max_tokens=3)
        assert bad.status_code == 500 and "diverged" in bad.json()["error"]["message"]
        assert good.status_code == 200
        body = {"model": "small", "prompt": [7], "max_tokens": 3, "stream": True}
        streamed = server.post("/v1/completions", **body)
        assert streamed.status_code == 500 and "diverged" in streamed.json()["error"]["message"]


def test_an_engine_that_dies_ends_every_stream_and_is_seen() -> None:
    with running() as server:
        engine, lines = server.engine, list[str]()
        body = {**LONG, "prompt": "a", "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            for number, line in enumerate(answer.iter_lines()):
                lines.append(line)
                if number == 0:
                    engine.step = fail  # type: ignore[method-assign]
        assert any("the engine failed: no memory" in line for line in lines)
        assert server.client.get("/health").status_code == 503
        late = server.post("/v1/completions", **LONG, prompt="a")
        assert late.status_code == 503 and "no memory" in late.json()["error"]["message"]


def fail() -> None:
    raise RuntimeError("no memory")


def test_a_step_that_fails_once_costs_nothing() -> None:
    with running() as server:
        engine = server.engine
        step, failures = engine.step, [0]

        def fails_at_times() -> Any:
            failures[0] += 1
            if failures[0] % 5 == 0:
                raise RuntimeError("for a moment")
            return step()

        before = server.post("/v1/completions", **SHORT, prompt="a", temperature=0).json()
        engine.step = fails_at_times  # type: ignore[method-assign]
        after = server.post("/v1/completions", **SHORT, prompt="a", temperature=0).json()
        assert after["choices"] == before["choices"] and failures[0] > 5


def test_a_deadline_cuts_an_answer_short() -> None:
    with running(timeout=0.0) as server:
        answer = server.post("/v1/completions", **LONG, prompt="a").json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] < 100
