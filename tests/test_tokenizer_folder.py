import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import find_file, has_tokenizer, read_facts, unobeyed
from tests.foreign import END, END_TURN, START_TURN, backend, vocabulary, write_folder

TEXT = "the the  thé\n"


# --- which token ends a text, and which begins one ------------------------------------------------


@pytest.mark.parametrize(
    ("specials", "files", "expected"),
    [
        ((END,), {}, (258, 258, 258)),  # GPT-2's: nothing is named
        ((END,), {"tokenizer_config": {"model_max_length": 1024}}, (258, 258, 258)),
        (("<s>", "</s>"), {"config": {"bos_token_id": 258, "eos_token_id": 259}}, (258, 259, 259)),
        (
            ("<s>", "</s>"),
            {"special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}},
            (258, 259, 259),
        ),
        (
            (END, END_TURN),
            {
                "tokenizer_config": {"eos_token": END_TURN, "bos_token": None},
                "config": {"bos_token_id": 258, "eos_token_id": 258},
            },
            (258, 259, 259),
        ),
    ],
)
def test_special_tokens_are_found_wherever_a_folder_names_them(
    tmp_path: Path, specials: tuple[str, ...], files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    found = Tokenizer.load(write_folder(tmp_path, backend(*specials), **files))
    assert (found.bos_id, found.eos_id, found.pad_id) == expected
    assert found.decode(found.encode(TEXT)) == TEXT


def test_nothing_says_which_token_ends_a_text(tmp_path: Path) -> None:
    write_folder(tmp_path, backend("<a>", "<b>"))
    with pytest.raises(ValueError, match=r"special tokens are .*<b>.*: write the name as "):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {258}),
        ({"generation_config": {"eos_token_id": [259, 258, 260]}}, {258, 259, 260}),
        ({"generation_config": {"eos_token_id": 260}}, {258, 260}),
        ({"config": {"eos_token_id": [258, 260]}}, {258, 260}),
        # generation_config.json is the later word, and an id without a token never comes.
        (
            {"config": {"eos_token_id": 259}, "generation_config": {"eos_token_id": [258, 999]}},
            {258},
        ),
    ],
)
def test_end_ids_are_a_set(tmp_path: Path, files: dict[str, Any], expected: set[int]) -> None:
    made = backend(END, START_TURN, END_TURN)
    names = {"tokenizer_config": {"eos_token": END}}
    found = Tokenizer.load(write_folder(tmp_path / "theirs", made, **names, **files))
    assert found.end_ids == expected
    found.save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours").end_ids == expected


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_a_text_begins_as_it_does_in_transformers(  # where the settings do not count
    tmp_path: Path, marked: bool, settings: dict[str, Any]
) -> None:
    made = backend("<s>", END, begin="<s>" if marked else "")
    names = {"bos_token": "<s>", "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_folder(tmp_path, made, tokenizer_config={**names, **settings})
    found, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode_prompt(TEXT) == theirs(TEXT)["input_ids"]
    assert found.begin_ids == ((258,) if marked else ())
    always = found.marking_begin()
    assert always.begin_ids == (258,) and always.fingerprint == found.fingerprint
    always.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").begin_ids == (258,)


# --- GPT-2's old files ----------------------------------------------------------------------------


def write_old(folder: Path, **files: Any) -> Path:
    vocab = {token: index for index, token in enumerate([*vocabulary(), END])}
    write_folder(folder, vocab=vocab, **files)
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\n", encoding="utf-8")
    return folder


def test_a_checkpoint_may_keep_its_tokenizer_in_a_folder(tmp_path: Path) -> None:
    """As IFM's artifacts; a tokenizer.json beside the weights comes first."""
    assert not has_tokenizer(tmp_path)
    write_folder(tmp_path / "tokenizer", backend("<s>", "</s>"), tokenizer_config={
        "bos_token": "<s>", "eos_token": "</s>"
    })  # fmt: skip
    assert has_tokenizer(tmp_path)
    assert find_file(tmp_path) == tmp_path / "tokenizer" / "tokenizer.json"
    found = Tokenizer.load(tmp_path)
    assert (found.bos_id, found.eos_id) == (258, 259)
    write_folder(tmp_path, backend(END))
    assert Tokenizer.load(tmp_path).eos_id == 258


def test_a_folder_of_vocab_and_merges(tmp_path: Path) -> None:
    write_old(tmp_path, added_tokens={"<new>": 259}, config={"model_type": "gpt2"})
    found, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "in <new> words", " the"):
        assert found.encode(text) == theirs(text)["input_ids"]
        assert found.decode(found.encode(text)) == text
    assert (found.eos_id, found.vocab_size) == (258, 260)
    assert 258 not in found.encode(f"a {END} in a text")


def test_old_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_old(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(ValueError, match="is of a Qwen2Tokenizer, which may cut text in another"):
        Tokenizer.load(tmp_path)


def test_added_tokens_that_the_file_lacks(tmp_path: Path) -> None:
    decoder = {
        "258": {"content": END, "special": True},
        "259": {"content": "<tool>", "special": False, "normalized": False, "__type": "AddedToken"},
        "260": {"content": END_TURN, "special": True},
    }
    settings = {"eos_token": END_TURN, "added_tokens_decoder": decoder}
    found = Tokenizer.load(write_folder(tmp_path, backend(END), tokenizer_config=settings))
    assert found.eos_id == 260 and found.encode("<tool>") == [259]
    assert found.decode([259, 260]) == "<tool>"
    decoder["270"] = decoder.pop("259")
    write_folder(tmp_path, backend(END), tokenizer_config=settings)
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' has id 260, and .* next free id is 259"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("generation_config.json", "{", r"generation_config\.json is not JSON"),
        ("config.json", "[]", r"config\.json holds a list, not an object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("added_tokens.json", '{"a": "b"}', "added tokens in .* cannot be read"),
        ("chat_template.jinja", b"\xff", "not UTF-8 text at byte 0"),
    ],
)
def test_a_damaged_file_is_one_clear_error(
    tmp_path: Path, name: str, text: str | bytes, said: str
) -> None:
    write_folder(tmp_path, backend(END))
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        Tokenizer.load(tmp_path)


def test_code_is_never_carried(tmp_path: Path) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["code.Code", None]}, "eos_token": END}
    folder = write_folder(tmp_path / "theirs", backend(END), tokenizer_config=settings)
    assert "auto_map" not in read_facts(folder).settings
    Tokenizer.load(folder).save(tmp_path / "ours")
    assert "auto_map" not in json.loads((tmp_path / "ours/tokenizer_config.json").read_text())


def test_what_a_checkpoint_asks_for_and_does_not_get() -> None:
    given = {
        "do_sample": True,
        "temperature": 0.7,
        "eos_token_id": [1],
        "max_new_tokens": 9,
        "encoder_repetition_penalty": 1.1,
        "min_p": 0.05,
        "num_beams": 1,
        "typical_p": 1.0,
        "bad_words_ids": [[3]],
        "suppress_tokens": None,
        "no_repeat_ngram_size": 0,
    }
    asked = {"encoder_repetition_penalty": 1.1, "bad_words_ids": [[3]]}
    assert unobeyed(given, sampled=True) == asked | {"min_p": 0.05}
    assert unobeyed(given, sampled=False) == asked
