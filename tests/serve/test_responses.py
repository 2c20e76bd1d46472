"""The newer form of a conversation, by OpenAI's own client."""

from typing import Any

import openai
import pytest

from tests.serve.running import Running


def test_a_response_is_the_chats_answer(client: openai.OpenAI) -> None:
    made = client.responses.create(
        model="small",
        instructions="be brief",
        input="hi",
        max_output_tokens=7,
        temperature=0,
        reasoning={"effort": "low"},
    )
    chat = client.chat.completions.create(
        model="small",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        max_tokens=7,
        temperature=0,
        reasoning_effort="low",
    )
    assert made.output_text == chat.choices[0].message.content
    assert made.usage is not None and chat.usage is not None
    assert made.usage.output_tokens == chat.usage.completion_tokens
    assert made.usage.input_tokens == chat.usage.prompt_tokens
    if chat.choices[0].finish_reason == "length":
        assert made.status == "incomplete" and made.incomplete_details is not None
    assert made.reasoning is not None and made.reasoning.effort == "low"
    assert type(made).model_validate(made.to_dict(), strict=False)


def test_a_conversation_of_parts(client: openai.OpenAI) -> None:
    settings: Any = {"model": "small", "max_output_tokens": 5, "temperature": 0}
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    assert (
        client.responses.create(input=parts, **settings).output_text
        == client.responses.create(input="hi", **settings).output_text
    )


def test_a_stream_has_the_events_in_order(client: openai.OpenAI) -> None:
    settings: Any = {"model": "small", "input": "hi", "max_output_tokens": 6, "temperature": 0}
    whole = client.responses.create(**settings, top_logprobs=2)
    events = list(client.responses.create(**settings, top_logprobs=2, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas: list[Any] = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text
    own: Any = whole.output[0]
    assert sum(len(event.logprobs) for event in deltas) == len(own.content[0].logprobs)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_object"}}}, "json_object"),
        ({"background": True}, "background"),
        ({"include": ["file_search_call.results"]}, "file_search_call"),
        ({"input": [{"type": "function_call_output"}]}, "function_call_output"),
        ({"input": [{"role": "robot", "content": "a"}]}, "robot"),
        ({"input": []}, "empty"),
        ({"reasoning": {"effort": "huge"}}, "huge"),
        ({"truncation": "auto"}, "truncation"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    server: Running, fields: dict[str, Any], said: str
) -> None:
    answer = server.client.post("/v1/responses", json={"model": "small", "input": "hi", **fields})
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
