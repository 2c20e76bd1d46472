"""The routes, over real sockets: what they answer, and that it is what ``generate`` gives."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from openmythos import generate
from openmythos.tokenizer import byte_tokenizer
from tests.serve.running import Running, running, small_model

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as here:
        yield here


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def alone(prompt: str, **settings: Any) -> list[int]:
    ids = TOKENIZER.encode_prompt(prompt)
    stops = TOKENIZER.end_ids
    return generate(small_model(), [ids], stop_tokens=stops, **settings).tokens[0]


def test_a_completion_is_what_generate_gives(client: openai.OpenAI) -> None:
    for loops in (1, 4, 7):
        made = client.completions.create(
            model="small", prompt="ab", max_tokens=9, temperature=0, extra_body={"num_loops": loops}
        )
        expected = alone("ab", max_new_tokens=9, num_loops=loops)
        assert made.choices[0].text == TOKENIZER.decode(expected)
        assert made.usage is not None
        assert made.usage.completion_tokens == len(expected)
        assert made.usage.prompt_tokens == len(TOKENIZER.encode_prompt("ab"))
        assert made.choices[0].finish_reason == ("length" if len(expected) == 9 else "stop")


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI) -> None:
    settings: Any = {
        "model": "small",
        "prompt": "hello",
        "max_tokens": 12,
        "seed": 3,
        "extra_body": {"include_loops": True, "exit_rule": {"kind": "kl", "threshold": 0.5}},
    }
    whole = client.completions.create(**settings)
    chunks = list(
        client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    last, first = chunks[-1].usage.to_dict(), whole.usage.to_dict()
    for usage in (last, first):  # the second found its prompt in pages
        usage.pop("prompt_tokens_details")
        usage["loops"].pop("prompt")  # type: ignore[attr-defined]
    assert last == first
    loops = [n for c in chunks if c.choices for n in c.choices[0].loops]  # type: ignore[attr-defined]
    assert loops == whole.choices[0].loops  # type: ignore[attr-defined]
    assert first["loops"]["total"] == sum(loops)  # type: ignore[index]


def test_chat_with_every_effort(client: openai.OpenAI, server: Running) -> None:
    table = client.models.list().data[0].reasoning_effort  # type: ignore[attr-defined]
    assert table == {
        "none": 1,
        "minimal": 1,
        "low": 2,
        "medium": 4,
        "high": 6,
        "xhigh": 8,
        "max": 8,
    }
    for effort, loops in table.items():
        made = client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "hi"}],
            reasoning_effort=effort,
            max_completion_tokens=5,
            temperature=0,
            extra_body={"include_loops": True},
        )
        assert set(made.choices[0].loops) == {loops}  # type: ignore[attr-defined]
        expected = alone("User: hi\nAssistant:", max_new_tokens=5, num_loops=loops)
        assert made.choices[0].message.content == TOKENIZER.decode(expected)
    with pytest.raises(openai.BadRequestError, match="reasoning_effort is 'huge'") as caught:
        client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "hi"}],
            reasoning_effort="huge",  # type: ignore[arg-type]
        )
    assert caught.value.param == "reasoning_effort"


def test_chat_streams_role_text_and_end(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="small",
            messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
            max_tokens=6,
            n=2,
            seed=1,
            logprobs=True,
            top_logprobs=3,
            stream=True,
        )
    )
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", "assistant"]
    for index in range(2):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert own[-1].finish_reason in ("length", "stop")
        assert all(choice.finish_reason is None for choice in own[:-1])
        entries = [e for c in own if c.logprobs for e in c.logprobs.content or []]
        assert len(entries) == 6 or own[-1].finish_reason == "stop"
        assert all(len(entry.top_logprobs) == 3 for entry in entries)


def test_choices_differ_by_their_draws_and_repeat_by_their_seed(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        made = client.completions.create(model="small", prompt="x", n=3, max_tokens=12, seed=seed)
        return [choice.text for choice in made.choices]

    assert texts(5) == texts(5) and len(set(texts(5))) > 1
    assert texts(5) != texts(6)


def test_several_prompts_as_text_and_ids(client: openai.OpenAI) -> None:
    ids = [TOKENIZER.encode_prompt(text) for text in ("ab", "cde")]
    settings: Any = {"model": "small", "max_tokens": 4, "temperature": 0}
    by_text = client.completions.create(prompt=["ab", "cde"], **settings)
    by_ids = client.completions.create(prompt=ids, **settings)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    assert [c.index for c in by_ids.choices] == [0, 1]
    one = client.completions.create(prompt=ids[0], **settings)
    assert one.choices[0].text == by_ids.choices[0].text


def test_stops_and_limits(client: openai.OpenAI) -> None:
    free = client.completions.create(model="small", prompt="ab", max_tokens=30, temperature=0)
    text = free.choices[0].text
    stop = text[len(text) // 2 :][:2]
    cut = client.completions.create(
        model="small", prompt="ab", max_tokens=30, temperature=0, stop=[stop, "never there"]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs_and_echo(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="small", prompt="abc", max_tokens=2, temperature=0, logprobs=2, echo=True
    )
    report = made.choices[0].logprobs
    assert report is not None and report.token_logprobs is not None and report.tokens is not None
    num_prompt = len(TOKENIZER.encode_prompt("abc"))
    assert len(report.tokens) == num_prompt + 2
    assert report.token_logprobs[0] is None and all(p <= 0 for p in report.token_logprobs[1:])
    assert "".join(report.tokens) == made.choices[0].text
    assert report.text_offset is not None and report.text_offset[-1] < len(made.choices[0].text)


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


def test_strict_clients_see_nothing_foreign(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "a"}], max_tokens=2
    )
    assert not made.model_extra and made.usage is not None and not made.usage.model_extra
    assert not made.choices[0].model_extra and not made.choices[0].message.model_extra


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


def test_numbers_that_are_none(server: Running) -> None:
    body = json.dumps({"model": "small", "prompt": "a", "temperature": float("nan")})
    head = {"content-type": "application/json"}
    answer = server.client.post("/v1/completions", content=body, headers=head)
    assert answer.status_code == 400 and "temperature" in answer.json()["error"]["message"]
