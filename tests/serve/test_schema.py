"""What bodies may hold."""

from typing import Any

import pydantic
import pytest

from openmythos.serve.error import APIError
from openmythos.serve.schema import ChatBody, CompletionBody, text_of

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def test_the_most_tokens_have_two_names() -> None:
    assert ChatBody(**CHAT).max_new_tokens() is None
    assert ChatBody(**CHAT, max_tokens=3).max_new_tokens() == 3
    assert ChatBody(**CHAT, max_tokens=3, max_completion_tokens=3).max_new_tokens() == 3
    with pytest.raises(APIError, match="differ"):
        ChatBody(**CHAT, max_tokens=3, max_completion_tokens=4).max_new_tokens()


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"modalities": ["audio"]},
        {"audio": {"voice": "x"}},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 2},
    ],
)
def test_what_is_not_offered_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(APIError) as caught:
        ChatBody(**CHAT, **fields).check()
    assert caught.value.param == next(iter(fields))


@pytest.mark.parametrize(
    "fields", [{"tool_choice": "auto"}, {"tools": []}, {"response_format": {"type": "text"}}]
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    ChatBody(**CHAT, **fields).check()


@pytest.mark.parametrize("stop", [[""], ["a"] * 17, "a" * 1001])
def test_stops_have_limits(stop: str | list[str]) -> None:
    with pytest.raises(APIError, match="stop"):
        CompletionBody(model="m", prompt="a", stop=stop).stops()
    assert CompletionBody(model="m", prompt="a", stop="x").stops() == ["x"]


def test_options_of_a_stream_need_one() -> None:
    with pytest.raises(APIError, match="stream_options needs stream"):
        CompletionBody(model="m", prompt="a", stream_options={}).usage_in_stream()


@pytest.mark.parametrize("prompt", [None, 5, {"a": 1}, [1.5], [None], ["a", 1], [[1], "a"]])
def test_prompts_of_other_kinds_are_refused(prompt: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        CompletionBody(model="m", prompt=prompt)


def test_text_of_parts() -> None:
    body = ChatBody.model_validate(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "a"}] * 2},
                {"role": "tool", "content": "x"},
            ],
        }
    )
    assert body.messages[0].plain() == {"role": "system", "content": "aa"}
    with pytest.raises(APIError, match="tool"):
        body.messages[1].plain()
    assert text_of(None) == ""
