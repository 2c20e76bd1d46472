"""What stands before every request: keys, sizes, numbers."""

import json
import logging

import pytest

from tests.serve.running import running


def test_keys_guard_the_api_and_nothing_else() -> None:
    with running(keys=["right", "other"]) as server:
        models = "/v1/models"
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
            answer = server.client.get(models, headers=given)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("right", "other"):
            answer = server.client.get(models, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        assert server.client.get("/health").status_code == 200
        assert server.post("/tokenize", prompt="a").status_code == 401


def test_bodies_have_a_limit() -> None:
    with running(max_body_bytes=1000) as server:
        body = json.dumps({"model": "small", "prompt": "a" * 2000}).encode()
        head = {"content-type": "application/json"}
        answer = server.client.post("/v1/completions", content=body, headers=head)
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]
        parts = (body[start : start + 100] for start in range(0, len(body), 100))  # no length
        answer = server.client.post("/v1/completions", content=parts, headers=head)
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]
        assert server.client.get("/health").status_code == 200


def test_a_body_of_100_mb_is_refused_before_it_comes() -> None:
    with running() as server, server.connect() as connection:
        connection.sendall(post(100_000_000))
        assert b" 413 " in connection.recv(1000)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with running(body_seconds=0.2) as server, server.connect() as connection:
        connection.sendall(post(100) + b'{"model"')
        answer = b"".join(iter(lambda: connection.recv(1000), b""))  # and the connection is closed
        assert b" 408 " in answer and b"the body took longer than 0.2 seconds" in answer
        assert server.client.get("/health").status_code == 200


def post(length: int) -> bytes:
    """The head of a request whose body has this length."""
    head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {length}\r\n\r\n".encode()


def test_a_request_has_a_number_and_a_line_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running() as server, caplog.at_level(logging.INFO, "openmythos.serve"):
        head = {"x-request-id": "my-number"}
        body = {"model": "small", "prompt": "secret", "max_tokens": 1}
        answer = server.client.post("/v1/completions", json=body, headers=head)
        assert answer.headers["x-request-id"] == "my-number"
        assert len(server.client.get("/health").headers["x-request-id"]) == 32
    lines = [json.loads(record.message) for record in caplog.records]
    assert lines[0]["id"] == "my-number" and lines[0]["status"] == 200
    assert "secret" not in caplog.text


def test_an_ending_server_refuses_new_work() -> None:
    with running() as server:
        server.guard.ending = True
        answer = server.post("/v1/completions", model="small", prompt="a")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert server.client.get("/health").status_code == 200
