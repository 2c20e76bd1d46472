import inspect
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2 import tokenization_qwen2
from transformers.models.qwen3_5 import tokenization_qwen3_5

from openmythos.interop import gguf_tokenizer as ours
from openmythos.interop.gguf_tokenizer import read_tokenizer
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.foreign import CHATML

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "1 2"]
WHOLE = "Ġyears"  # a token that no merges lead to
TEXT = (
    "It's   the THE'S McDonald\tof 12 years, 1234567 items!?\r\n\r\n  def f(x):\n\treturn x**2 "
    "e\u0301te\u0301 \u4e2d\u6587 \u0e01\u0e33 \u00b2 ``ok'' a  "
)


def vocabulary() -> tuple[list[str], list[int]]:
    """Control tokens, one that users defined, the bytes, and what the merges make."""
    letters = [t for t in sorted(byte_tokenizer()._config["model"]["vocab"]) if len(t) == 1]
    tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES), WHOLE]
    kinds = [ours.CONTROL] * 3 + [ours.USER_DEFINED] + [1] * (len(tokens) - 4)
    return tokens, kinds


def fields(pre: str | None = "smollm", **changes: Any) -> dict[str, Any]:
    """The fields of a GGUF file that describe its tokenizer."""
    tokens, kinds = vocabulary()
    found = {"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": MERGES}
    found |= {"bos_token_id": 1, "eos_token_id": 2} | ({} if pre is None else {"pre": pre})
    named = {f"tokenizer.ggml.{name}": value for name, value in (found | changes).items()}
    return {name: value for name, value in named.items() if value is not None}


def pieces(cutter: pre_tokenizers.PreTokenizer, text: str = TEXT) -> list[str]:
    return [text[start:stop] for _, (start, stop) in cutter.pre_tokenize_str(text)]


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """As the models' own files have it."""
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytewise]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = inspect.signature(TikTokenConverter).parameters["pattern"].default
THEIRS = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": split(LLAMA3),
    "qwen2": split(tokenization_qwen2.PRETOKENIZE_REGEX),
    "qwen35": split(tokenization_qwen3_5.PRETOKENIZE_REGEX),
}


@pytest.mark.parametrize("name", THEIRS)
def test_text_is_cut_as_by_the_models_own_tokenizers(name: str) -> None:
    found = read_tokenizer(fields(name))._backend.pre_tokenizer
    assert pieces(found) == pieces(THEIRS[name])
    others = [pieces(cutter) for other, cutter in THEIRS.items() if other != name]
    assert pieces(found) not in others


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("deepseek-coder", "a 12,x\r\n\u4e2d!", [*"a 12,x\r\n\u4e2d!"]),
        ("deepseek-v3", "'s 1234 ok!\n\u4e2d", ["'s", " ", "123", "4", " ok", "!\n", "\u4e2d"]),
        ("tekken", "theTHE's 123\n", ["the", "THE", "'s", " ", "1", "2", "3", "\n"]),
        ("gpt-4o", "theTHE's 1234/\n", ["the", "THE's", " ", "123", "4", "/\n"]),
        ("seed-coder", "It's 12!\n", ["It", "'s", " ", "1", "2", "!", "\n"]),
        ("default", "It's 1234$x", ["It", "'", "s", " ", "123", "4", "$", "x"]),
    ],
)  # fmt: skip
def test_cuts_by_hand(name: str, text: str, expected: list[str]) -> None:
    assert pieces(read_tokenizer(fields(name))._backend.pre_tokenizer, text) == expected


@pytest.mark.parametrize("name", sorted(ours.CUTS))
def test_no_text_is_lost(name: str) -> None:
    found = read_tokenizer(fields(name))
    assert found.decode(found.encode(TEXT)) == TEXT and found.change is None


def test_the_ids_are_those_of_transformers() -> None:
    """Of a Llama 3: a piece that is a token is one, though no merges lead to it; bos is first."""
    tokens, _ = vocabulary()
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = split(LLAMA3)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    found = read_tokenizer(fields("llama-bpe"))
    assert found.encode(TEXT) == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert vocab[WHOLE] in found.encode(TEXT) and found.begin_ids == (1,)
    merged = read_tokenizer(fields("smaug-bpe"))
    assert vocab[WHOLE] not in merged.encode(TEXT) and merged.begin_ids == ()


def test_special_tokens_ends_and_templates(tmp_path: Path) -> None:
    """All of it is written into the files that transformers reads, and comes back."""
    given = fields("llama-bpe", eot_token_id=0, eom_token_id=2, add_eos_token=True)
    read_tokenizer({**given, "tokenizer.chat_template": CHATML}).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = Tokenizer.load(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, 2)
    assert found.end_ids == {0, 2} and found.chat_template == theirs.chat_template == CHATML
    assert found.encode_prompt("in") == theirs("in")["input_ids"][:-1]
    assert theirs("in")["input_ids"][-1] == 2 and theirs.bos_token == "<|im_start|>"
    talk = [{"role": "user", "content": "the <file>"}]
    rendered = theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert found.encode_chat(talk) == rendered
    assert found.encode("<|im_end|>", special=True) == [2] != found.encode("<|im_end|>")
    plain = read_tokenizer(fields("llama-bpe", add_bos_token=False, bos_token_id=None))
    assert plain.begin_ids == () and plain.bos_id == 2 and "bos_token" not in plain.settings
    assert read_tokenizer(fields("qwen2", add_bos_token=True)).begin_ids == (1,)
    named = {"tokenizer.chat_templates": ["tools"], "tokenizer.chat_template.tools": "x"}
    several = read_tokenizer({**fields(), **named, "tokenizer.chat_template": CHATML})
    assert several.chat_template == CHATML
    assert {"name": "tools", "template": "x"} in several.settings["chat_template"]


def test_padding_of_the_vocabulary_is_no_text() -> None:
    tokens, kinds = vocabulary()
    padded, types = ["[PAD0]", *tokens[1:], "[PAD1]", "[PAD2]"], [ours.UNUSED, *kinds[1:], 5, 5]
    made = read_tokenizer(fields(tokens=padded, token_type=types))
    assert made.vocab_size == len(tokens)
    assert made.decode([0, len(tokens), len(tokens) + 1]) == ""
    assert made.encode("[PAD0]") != [0]
    # A padding id may be one of them, or, in other files, mean that there is none.
    named = fields(tokens=padded, token_type=types, padding_token_id=len(tokens) + 1)
    assert read_tokenizer(named).pad_id == len(tokens) + 1
    none = read_tokenizer(fields("llama-bpe", padding_token_id=2**32 - 1, bos_token_id=-1))
    assert (none.pad_id, none.bos_id, none.begin_ids) == (2, 2, ())
    assert not {"pad_token", "bos_token"} & none.settings.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "llama"}, "it is of the kind 'llama'; only byte-level BPE, 'gpt2', can be read"),
        ({"pre": "kimi-k2"}, "it cuts text as 'kimi-k2'; allowed: chatglm-bpe, codeshell"),
        ({"eos_token_id": 9999}, "eos_token_id is 9999, and it has 266 tokens"),
        ({"merges": ["a nowhere"]}, "its merges do not fit its tokens"),
    ],
)
def test_what_cannot_be_mapped_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        read_tokenizer(fields(**changes))
    assert said in str(error.value)
    with pytest.raises(KeyError, match="eos_token_id"):
        read_tokenizer(fields(eos_token_id=None))
    assert read_tokenizer(fields(None)).encode("12") != read_tokenizer(fields("gpt-2")).encode(
        "1,2"
    )
