"""Completions: what they answer is what ``generate`` gives."""

from typing import Any

import openai

from openmythos.tokenizer import byte_tokenizer
from tests.serve.running import alone

TOKENIZER = byte_tokenizer()


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


def test_the_loops_of_a_prompt_are_those_of_all_but_its_last_token(client: openai.OpenAI) -> None:
    prompts, size = ["one two", "three four"], TOKENIZER.encode_prompt
    made = client.completions.create(
        model="small",
        prompt=prompts,
        max_tokens=2,
        n=2,
        extra_body={"num_loops": 3, "include_loops": True},
    )
    assert made.usage is not None and made.usage.prompt_tokens_details is not None
    loops: Any = made.usage.loops  # type: ignore[attr-defined]
    assert made.usage.prompt_tokens_details.cached_tokens == 0
    assert loops["prompt"] == 3 * sum(len(size(prompt)) - 1 for prompt in prompts)


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
