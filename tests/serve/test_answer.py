"""From tokens to text, log-probabilities and loops."""

import math

from openmythos.engine.sampling import Logprobs
from openmythos.serve.answer import (
    Token,
    chat_logprobs,
    completion_logprobs,
    finite,
    loop_counts,
)
from openmythos.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
GRAY, E_ACUTE = TOKENIZER.encode("a"), TOKENIZER.encode("é")


def test_loops_by_numbers() -> None:
    counts = loop_counts([1, 4, 4], 20)
    assert counts == {"total": 9, "mean": 3.0, "max": 4, "prompt": 20}
    assert loop_counts([], 0) == {"total": 0, "mean": 0.0, "max": 0, "prompt": 0}


def test_tokens_that_are_half_a_character_keep_their_bytes() -> None:
    first, second = E_ACUTE
    report = Logprobs(-0.5, ((first, -0.5), (second, -math.inf)))
    content = chat_logprobs([Token(first, 2, report)], TOKENIZER)["content"]
    assert content[0]["bytes"] == [0xC3] and content[0]["token"] == "\ufffd"
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    assert chat_logprobs([Token(first, 2, None)], TOKENIZER)["content"] == []


def test_offsets_count_characters() -> None:
    ids = TOKENIZER.encode("abc")
    report = Logprobs(-1.0, ((ids[0], -1.0),))
    made = completion_logprobs([(ids[0], None), (ids[1], report)], TOKENIZER, 5)
    assert made["text_offset"] == [5, 6] and made["tokens"] == ["a", "b"]
    assert made["token_logprobs"] == [None, -1.0] and made["top_logprobs"] == [None, {"a": -1.0}]


def test_json_has_no_infinity() -> None:
    assert finite(-math.inf) == -9999.0 and finite(-2.0) == -2.0
