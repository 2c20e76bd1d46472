"""A model that is served: prompts, conversations, limits."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.engine.request import Request
from openmythos.eval.puzzle import PuzzleCodec
from openmythos.model.exit import Fixed, KLExit
from openmythos.serve.error import APIError
from openmythos.serve.schema import CompletionBody, Message
from openmythos.serve.served import ServedModel
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.foreign import write_chat_folder
from tests.serve.running import Running, running, small_model


def test_a_conversation_in_its_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_chat_folder(tmp_path / "chat"))
    model = small_model(vocab_size=tokenizer.vocab_size)
    with running({"chat": (model, tokenizer)}) as server:
        served = server.served[0]
        messages = [Message(role="user", content="hi")]
        plain = [{"role": "user", "content": "hi"}]
        assert served.encode_chat(messages) == (tokenizer.encode_chat(plain), [])
        answer = server.post("/v1/chat/completions", model="chat", max_tokens=2, messages=plain)
        assert answer.status_code == 200 and "x-warning" not in answer.headers
        assert served.card()["chat_template"] is True


def test_a_template_that_fails_is_the_clients_to_know(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_chat_folder(tmp_path / "chat"))
    model = small_model(vocab_size=tokenizer.vocab_size)
    with running({"chat": (model, tokenizer)}) as server:
        for template in ("{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 }}"):
            tokenizer.chat_template = template
            messages = [{"role": "user", "content": "hi"}]
            answer = server.post("/v1/chat/completions", model="chat", messages=messages)
            said = answer.json()["error"]["message"]
            assert answer.status_code == 400 and "chat template fails" in said
            assert "alternate" in said or "zero" in said


def test_a_model_of_walks_reads_words_and_answers_one() -> None:
    codec = PuzzleCodec(Walks(HopsConfig()))
    model = small_model(vocab_size=codec.vocab_size)
    with running({"walks": (model, codec)}) as server:
        body = {"model": "walks", "temperature": 0}
        text = server.post("/v1/completions", prompt="e3 r1 r0", **body, max_tokens=1).json()
        said = {"role": "user", "content": "e3 r1 r0"}
        chat = server.post("/v1/chat/completions", messages=[said], **body).json()
        answer = text["choices"][0]["text"]
        assert answer == chat["choices"][0]["message"]["content"]
        assert answer.strip() in codec.words and chat["usage"]["completion_tokens"] == 1
        wrong = server.post("/v1/completions", prompt="e3 hello", **body)
        assert wrong.status_code == 400 and "'hello'" in wrong.json()["error"]["message"]


def test_without_a_template_a_transcript(server: Running) -> None:
    served = server.served[0]
    messages = [
        Message(role="system", content="be brief"),
        Message(role="user", content="hi"),
        Message(role="assistant", content="yes"),
        Message(role="user", content="so?"),
    ]
    ids, stops = served.encode_chat(messages)
    text = "System: be brief\nUser: hi\nAssistant: yes\nUser: so?\nAssistant:"
    assert ids == byte_tokenizer().encode_prompt(text) and stops == ["\nUser:"]


def test_a_prompt_may_fill_all_but_one_token(server: Running) -> None:
    served, body = server.served[0], CompletionBody(model="small", prompt="a")
    longest = served.requests(body, [5] * 127, None, None)[0]
    assert longest.max_new_tokens == 1
    with pytest.raises(APIError) as caught:
        served.requests(body, [5] * 128, None, None)
    assert caught.value.code == "context_length_exceeded"


def test_seeds_of_any_sign_are_seeds(server: Running) -> None:
    served = server.served[0]
    body = CompletionBody(model="small", prompt="a", seed=-1, n=2)
    one, two = served.requests(body, [5], 3, None)
    assert one.seed == two.seed == 2**64 - 1 and (one.sample_idx, two.sample_idx) == (0, 1)


def test_logprobs_of_a_prompt_are_the_models(server: Running) -> None:
    served = server.served[0]
    request = served.requests(CompletionBody(model="small", prompt="a"), [5, 9, 7], 1, None)[0]
    reports = asyncio.run(served.prompt_logprobs(request, 2))
    assert reports[0] is None
    with torch.no_grad():
        logits = small_model()([[5, 9, 7]]).logits[0].double().log_softmax(-1)
    for place, (report, token) in enumerate(zip(reports[1:], [9, 7], strict=True)):
        assert report is not None
        assert report.chosen == pytest.approx(float(logits[place, token]), abs=1e-5)


PATHS = {
    "/v1/completions": {"prompt": "the same long beginning of a prompt", "max_tokens": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a long conversation"}],
        "max_completion_tokens": 2,
    },
    "/v1/responses": {"input": "what has been said before", "max_output_tokens": 2},
}


@pytest.mark.parametrize("path", PATHS)
def test_salt_and_priority_reach_the_engine(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        given, add = [], server.engine.add

        def adds(request: Request, *, priority: int, timeout: float | None, salt: str) -> int:
            given.append((priority, salt))
            return add(request, priority=priority, timeout=timeout, salt=salt)

        monkeypatch.setattr(server.engine, "add", adds)

        def num_found(**fields: Any) -> int:
            before = server.engine.stats.num_prompt_tokens_found
            answer = server.post(path, model="small", seed=1, **PATHS[path], **fields)
            assert answer.status_code == 200
            warning = answer.headers.get("x-warning", "")
            assert "priority" not in warning and "cache_salt" not in warning
            server.wait_until_idle()
            return server.engine.stats.num_prompt_tokens_found - before

        found = [num_found(), num_found(priority=-3), num_found(cache_salt="mine")]
        found += [num_found(cache_salt="mine", priority=2), num_found(cache_salt="yours")]
        assert [number > 0 for number in found] == [False, True, False, True, False]
        assert given == [(0, ""), (-3, ""), (0, "mine"), (2, "mine"), (0, "yours")]


@pytest.mark.parametrize(
    "fields", [{"priority": 1001}, {"priority": 0.5}, {"cache_salt": ""}, {"cache_salt": 5}]
)
def test_salts_and_priorities_that_are_none_are_refused(
    server: Running, fields: dict[str, Any]
) -> None:
    answer = server.post("/v1/completions", model="small", prompt="a", **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(fields))


def test_a_body_without_a_depth_gets_the_default_depth_and_rule(server: Running) -> None:
    made = server.served[0]
    rule = KLExit(threshold=0.1)
    served = ServedModel(
        "small", made.model, made.codec, made.worker, default_rule=rule, default_loops=3
    )
    body = {"model": "small", "prompt": "a"}
    assert served.depth_of(CompletionBody(**body)) == (3, rule)
    assert served.depth_of(CompletionBody(**body, num_loops=5)) == (5, rule)
    assert served.depth_of(CompletionBody(**body, reasoning_effort="medium")) == (4, rule)
    assert served.depth_of(CompletionBody(**body, exit_rule={"kind": "fixed"})) == (3, Fixed())
    card = served.card()
    assert card["default_loops"] == 3 and card["default_exit_rule"]["kind"] == "kl"
    own = made.card()
    assert own["default_loops"] == 4 and own["default_exit_rule"] is None
