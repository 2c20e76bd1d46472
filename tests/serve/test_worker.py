"""The engine's thread: clients that hang up, a full queue, an engine that fails or dies."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
import torch

from openmythos.engine.request import Request
from openmythos.serve.error import APIError
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


def test_streams_at_once_are_each_their_own() -> None:
    fields = {"model": "small", "max_tokens": 4, "num_loops": 1, "temperature": 0, "stream": True}
    with running(max_rows=4) as server:
        bodies = [{**fields, "prompt": f"{number} is one"} for number in range(8)]
        ask = partial(server.client.post, "/v1/completions")

        def text_of(body: dict[str, Any]) -> str:
            lines = ask(json=body).text.splitlines()
            assert lines[-2] == "data: [DONE]"
            return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-2:2])

        alone = [text_of(body) for body in bodies]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(text_of, bodies)) == alone
        assert len(set(alone)) > 4


def test_who_hangs_up_before_the_engine_has_the_request_leaves_nothing() -> None:
    with running() as server:
        worker, held = server.served[0].worker, threading.Event()
        request = Request(tokens=[7], max_new_tokens=100)

        async def hang_up_early() -> None:
            busy = asyncio.ensure_future(worker.call(held.wait))
            opening = asyncio.ensure_future(
                worker.open([request] * 3, priority=0, timeout=None, salt="")
            )
            await asyncio.sleep(0.02)
            opening.cancel()
            await asyncio.wait([opening])
            held.set()
            await busy
            await worker.call(lambda: None)

        asyncio.run(hang_up_early())
        server.wait_until_idle()
        assert server.engine.stats.finished == {"abort": 3}


def test_requests_are_taken_all_or_none() -> None:
    with running(max_rows=1, max_waiting=3) as server:
        worker = server.served[0].worker
        good, bad = Request(tokens=[7], max_new_tokens=4), Request(tokens=[7], max_new_tokens=999)
        with pytest.raises(APIError, match="asks for 999") as caught:
            asyncio.run(worker.open([good, bad], priority=0, timeout=None, salt=""))
        assert caught.value.status == 400
        with pytest.raises(APIError, match="give up to 4") as caught:
            asyncio.run(worker.open([good] * 5, priority=0, timeout=None, salt=""))
        assert caught.value.status == 400
        server.wait_until_idle()


def test_a_stop_text_ends_its_request_at_once_and_is_counted_as_stop() -> None:
    with running() as server:
        body = {**LONG, "prompt": "ab", "temperature": 0, "max_tokens": 30, "num_loops": 1}
        text = server.post("/v1/completions", **body).json()["choices"][0]["text"]
        done = server.engine.stats.num_new_tokens
        server.post("/v1/completions", **body, stop=text[2:5])
        server.wait_until_idle()
        assert server.engine.stats.num_new_tokens - done < 20
        said = 'openmythos_requests_total{finish_reason="stop",model="small"} 1.0'
        assert said in server.client.get("/metrics").text


def test_what_is_cut_short_ends_with_what_it_has() -> None:
    with running() as server:
        body = {**LONG, "prompt": "a", "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.served[0].worker.cut_short()
            rest = [line for line in lines if line]
        assert "data: {" in first and rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2] and len(rest) < 100


def test_a_deadline_cuts_an_answer_short() -> None:
    with running(timeout=0.0) as server:
        answer = server.post("/v1/completions", **LONG, prompt="a").json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] < 100
