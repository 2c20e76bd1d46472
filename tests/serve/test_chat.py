"""Chat: efforts, streams, and nothing foreign."""

import openai
import pytest

from openmythos.tokenizer import byte_tokenizer
from tests.serve.running import Running, alone

TOKENIZER = byte_tokenizer()


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


def test_strict_clients_see_nothing_foreign(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "a"}], max_tokens=2
    )
    assert not made.model_extra and made.usage is not None and not made.usage.model_extra
    assert not made.choices[0].model_extra and not made.choices[0].message.model_extra
