"""The routes beside generation, and every bad request."""

import json
from typing import Any

import pytest

from openmythos.tokenizer import byte_tokenizer
from tests.serve.running import Running

TOKENIZER = byte_tokenizer()


def test_tokenize_and_back(server: Running) -> None:
    made = server.post("/tokenize", prompt="grün").json()
    assert made["tokens"] == TOKENIZER.encode_prompt("grün") and made["count"] == len(
        made["tokens"]
    )
    assert server.post("/detokenize", tokens=made["tokens"]).json() == {"prompt": "grün"}


def test_what_is_ignored_is_named(server: Running) -> None:
    answer = server.post("/v1/completions", model="small", prompt="a", max_tokens=1, zeal=3)
    assert answer.status_code == 200 and answer.headers["x-warning"] == "ignored: zeal"
    answer = server.post(
        "/v1/chat/completions", model="small", messages=[{"role": "user", "content": "a"}]
    )
    assert "no chat template" in answer.headers["x-warning"]


def test_state(server: Running) -> None:
    assert server.client.get("/health").json() == {"status": "ok", "dead": []}
    assert server.client.get("/ready").status_code == 200
    text = server.client.get("/metrics").text
    for name in ("requests_running", "loops_per_token_bucket", "time_to_first_token_seconds_count"):
        assert f"openmythos_{name}" in text
    assert 'openmythos_pages{model="small"}' in text


BAD: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "no model": ("/v1/completions", {"prompt": "a"}, 400, "model"),
    "unknown model": ("/v1/completions", {"model": "x", "prompt": "a"}, 404, "no model 'x'"),
    "empty prompt list": ("/v1/completions", {"model": "small", "prompt": []}, 400, "empty list"),
    "empty ids": ("/v1/completions", {"model": "small", "prompt": [[]]}, 400, "empty"),
    "ids out of range": ("/v1/completions", {"model": "small", "prompt": [9999]}, 400, "outside"),
    "negative id": ("/v1/completions", {"model": "small", "prompt": [-1]}, 400, "outside"),
    "too long": (
        "/v1/completions",
        {"model": "small", "prompt": "a" * 100, "max_tokens": 100},
        400,
        "together they may have 128",
    ),
    "n 0": ("/v1/completions", {"model": "small", "prompt": "a", "n": 0}, 400, "n:"),
    "temperature": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "temperature": -1},
        400,
        "",
    ),
    "stop of 1 MB": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "stop": "s" * 500_000},
        400,
        "stop text",
    ),
    "empty stop": ("/v1/completions", {"model": "small", "prompt": "a", "stop": ""}, 400, "stop"),
    "effort": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "reasoning_effort": "huge"},
        400,
        "it must be one of none, minimal",
    ),
    "penalty": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "repetition_penalty": 1e-300},
        400,
        "repetition_penalty",
    ),
    "more answers than there can be": (
        "/v1/completions",
        {"model": "small", "prompt": ["a", "b", "c"], "n": 128},
        400,
        "384 answers are asked for; give up to 264",
    ),
    "too many biases": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "logit_bias": {str(i): "x" for i in range(2000)}},
        400,
        "give up to 1024",
    ),
    "bias of 5000 digits": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "logit_bias": {"9" * 5000: 1}},
        400,
        "",
    ),
    "metadata that is nested": (
        "/v1/responses",
        {"model": "small", "input": "a", "metadata": {"a": [[[]]]}},
        400,
        "metadata",
    ),
    "bias": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "logit_bias": {"9999": 1}},
        400,
        "no token id",
    ),
    "loops 0": ("/v1/completions", {"model": "small", "prompt": "a", "num_loops": 0}, 400, "1..8"),
    "loops 9": ("/v1/completions", {"model": "small", "prompt": "a", "num_loops": 9}, 400, "1..8"),
    "rule without kind": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "exit_rule": {}},
        400,
        "kind",
    ),
    "rule's field": (
        "/v1/completions",
        {"model": "small", "prompt": "a", "exit_rule": {"kind": "kl", "speed": 1}},
        400,
        "speed",
    ),
    "rule without head": (
        "/v1/completions",
        {
            "model": "small",
            "prompt": "a",
            "exit_rule": {"kind": "cumulative_threshold", "threshold": 0.5},
        },
        400,
        "halting head",
    ),
    "no messages": ("/v1/chat/completions", {"model": "small", "messages": []}, 400, "messages"),
    "empty messages": (
        "/v1/chat/completions",
        {"model": "small", "messages": [{"role": "user", "content": ""}]},
        400,
        "empty",
    ),
    "tools": (
        "/v1/chat/completions",
        {"model": "small", "messages": [{"role": "user", "content": "a"}], "tools": [{}]},
        400,
        "tools",
    ),
    "json schema": (
        "/v1/chat/completions",
        {
            "model": "small",
            "messages": [{"role": "user", "content": "a"}],
            "response_format": {"type": "json_schema"},
        },
        400,
        "json_schema",
    ),
    "image": (
        "/v1/chat/completions",
        {
            "model": "small",
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        },
        400,
        "only text",
    ),
    "no route": ("/v1/embeddings", {}, 404, "Not Found"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(server: Running, name: str) -> None:
    path, body, status, said = BAD[name]
    answer = server.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert said in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe", b'{"model": "small", "prompt": NaN}', b"[" * 100_000, b"null"],
)
def test_bodies_that_are_no_objects(server: Running, content: bytes) -> None:
    head = {"content-type": "application/json"}
    answer = server.client.post("/v1/completions", content=content, headers=head)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_million_mistakes_are_told_as_the_first(server: Running) -> None:
    answer = server.post("/v1/completions", model="small", prompt=[1.5] * 200_000)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prompt")
    wrong = server.post("/v1/completions", model="x" * 100_000, prompt="a")
    assert wrong.status_code == 404 and len(wrong.content) < 2000


def test_numbers_that_are_none(server: Running) -> None:
    body = json.dumps({"model": "small", "prompt": "a", "temperature": float("nan")})
    head = {"content-type": "application/json"}
    answer = server.client.post("/v1/completions", content=body, headers=head)
    assert answer.status_code == 400 and "temperature" in answer.json()["error"]["message"]
