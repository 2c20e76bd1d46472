import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from openmythos.byte_level import byte_characters
from openmythos.data.prepare import prepare
from openmythos.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    MAX_TRAINING_PIECE,
    MIN_BPE_VOCAB,
    PAD_TOKEN,
    Tokenizer,
    byte_tokenizer,
    train_bpe,
)
from tests.foreign import CHATML, END, START_TURN, backend, write_chat_folder, write_folder

NAMED = {"bos_token": END, "eos_token": END, "pad_token": END}
SAMPLE = [
    "def greet(name):\n    if name:\n        return f'hello {name}'\n    return None\n",
    "The quick brown fox jumps over the lazy dog. It's 2024, they're running: été, 漢字, 😀.\n\n",
] * 8

BYTES = byte_tokenizer()
BPE = train_bpe(SAMPLE, 340)

TRICKY = [BOS_TOKEN, PAD_TOKEN, "\r\n", "\n    ", "\t", "  ", "'s", "é", "_x", "123", "\0"]
any_text = st.text(st.characters(codec="utf-8")) | st.lists(st.sampled_from(TRICKY)).map("".join)


@given(any_text)
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_any_text_comes_back_byte_for_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_num_bytes[ids].sum()) == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


@given(st.lists(any_text, max_size=4))
def test_a_batch_encodes_like_its_texts_alone(texts):
    assert BPE.encode_batch(texts) == [BPE.encode(text) for text in texts]


def test_every_id_has_its_bytes():
    assert BYTES.vocab_size == 259
    assert BYTES.encode("a") == [3 + ord("a")]
    for tokenizer in (BYTES, BPE):
        sizes = tokenizer.token_num_bytes
        specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
        assert len(sizes) == tokenizer.vocab_size
        assert np.flatnonzero(sizes == 0).tolist() == sorted(specials)
        pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        assert [len(piece) for piece in pieces] == sizes.tolist()
        assert {bytes([b]) for b in range(256)} <= set(pieces)


def test_decoding_skips_specials_and_replaces_half_characters():
    euro = BYTES.encode("€")
    assert BYTES.decode([BYTES.bos_id, *euro, BYTES.eos_id]) == "€"
    assert BYTES.decode(euro[:2]) == "\ufffd"


def test_ids_past_the_vocabulary_have_no_text_and_negative_ones_are_refused():
    assert BYTES.decode([259, *BYTES.encode("a"), 100_000]) == "a"
    with pytest.raises(ValueError, match="token id -1 is negative"):
        BYTES.decode([-1])


def test_training_is_deterministic_and_fills_the_vocabulary():
    assert train_bpe(iter(SAMPLE), 340).fingerprint == BPE.fingerprint
    assert BPE.vocab_size == 340
    assert train_bpe(SAMPLE, MIN_BPE_VOCAB).vocab_size == MIN_BPE_VOCAB
    assert train_bpe(["ab"], 1000).vocab_size == MIN_BPE_VOCAB  # no pair occurs twice


def test_training_is_the_same_in_another_process():
    code = (
        "from openmythos.tokenizer import train_bpe; import sys, json;"
        "print(train_bpe(json.loads(sys.argv[1]), 340).fingerprint, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(SAMPLE)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [BPE.fingerprint, "False"]


def test_a_line_break_takes_its_indentation_along():
    pieces = [BPE.decode([i]) for i in BPE.encode("\n        return\n    return")]
    assert pieces == ["\n       ", " return", "\n   ", " return"]


def test_saved_tokenizer_is_the_same_here_and_in_the_tokenizers_library(tmp_path):
    path = BPE.save(tmp_path / "new")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    for place in (path, path.parent):
        loaded = Tokenizer.load(place)
        assert loaded.fingerprint == BPE.fingerprint
        assert loaded.encode("hello world" + BOS_TOKEN) == BPE.encode("hello world" + BOS_TOKEN)
    library = tokenizers.Tokenizer.from_file(str(path))
    assert library.encode("hello world").ids == BPE.encode_prompt("hello world")
    assert library.decode(BPE.encode("hello world")) == "hello world"


def test_fingerprint_tells_tokenizers_apart_and_not_formatting(tmp_path):
    assert BPE.fingerprint != BYTES.fingerprint != train_bpe(SAMPLE, 341).fingerprint
    path = BPE.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert Tokenizer.load(path).fingerprint == BPE.fingerprint


def test_another_projects_names_for_the_specials(tmp_path):
    path = BPE.save(tmp_path)
    path.write_text(path.read_text().replace(BOS_TOKEN, "<s>").replace(PAD_TOKEN, "<unk>"))
    with pytest.raises(
        ValueError, match=r"not say which .* \['<s>', .*eos_token into tokenizer_co"
    ):
        Tokenizer.load(path)
    with pytest.raises(ValueError, match=r"no special token '</s>'; it has \['<s>',"):
        Tokenizer.load(path, eos_token="</s>")
    loaded = Tokenizer.load(path, bos_token="<s>", eos_token=EOS_TOKEN)
    assert loaded.bos_id == BPE.bos_id
    assert loaded.pad_id == loaded.eos_id


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*nothing"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer.json that can be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff")
    with pytest.raises(ValueError, match="not UTF-8 text at byte 1"):
        Tokenizer.load(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"not a byte-level BPE .model WordLevel"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size is 258; it must be at least 259"):
        train_bpe(SAMPLE, 258)
    with pytest.raises(ValueError, match="no text"):
        train_bpe([], 300)
    with pytest.raises(ValueError, match=r"not UTF-8: .* at character 2 stands for no character"):
        BPE.encode("ab\ud800")
    with pytest.raises(ValueError, match="not UTF-8"):
        BPE.encode_batch(["fine", "\udfff"])


@pytest.mark.parametrize("unit", [" ", "\n", "a", "!", " \n", "\t"])
def test_long_runs_take_linear_time(unit):
    text = unit * 50_000
    assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.parametrize("unit", [" ", "\n", "a", "!", "漢"])
def test_training_cuts_long_runs(unit):
    """A run without a boundary would take quadratic time; 200,000 letters took 26 seconds."""
    tokenizer = train_bpe([unit * 3000, "some text, some text"], 340)
    longest = MAX_TRAINING_PIECE * len(unit.encode())
    assert longest / 3 <= tokenizer.token_num_bytes.max() <= longest
    text = unit * 50_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_run_of_many_letters_is_learnt_like_its_parts():
    letters = "".join("acgt"[(i * i + i // 7) % 4] for i in range(MAX_TRAINING_PIECE * 20))
    parts = [
        letters[i : i + MAX_TRAINING_PIECE] for i in range(0, len(letters), MAX_TRAINING_PIECE)
    ]
    assert train_bpe([letters], 400).fingerprint == train_bpe(parts, 400).fingerprint


def test_a_run_and_prepared_data_hold_a_tokenizer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    BYTES.save(run / "data" / "data-0")
    index = json.dumps({"tokenizer_file": "data-0/tokenizer.json"})
    (run / "data" / "index.json").write_text(index, encoding="utf-8")
    for place in (run, run / "data"):  # before the run's first checkpoint, its data is all it has
        assert Tokenizer.load(place).fingerprint == BYTES.fingerprint
    BYTES.save(run / "checkpoints" / "step-00000001")
    BPE.save(run / "checkpoints" / "step-00000002")
    assert Tokenizer.load(run).fingerprint == BPE.fingerprint
    for damage in ("{", "[]", "{}", '{"tokenizer_file": 3}'):
        (run / "data" / "index.json").write_text(damage, encoding="utf-8")
        with pytest.raises(ValueError, match=r"no tokenizer at .*data/tokenizer\.json"):
            Tokenizer.load(run / "data")


# --- special tokens under other names -------------------------------------------------------------


def test_other_names_are_kept_beside_the_file(tmp_path: Path) -> None:
    file = train_bpe(SAMPLE, 300).save(tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["tokenizer.json"]
    renamed = Tokenizer.load(file, bos_token="<|eos|>")
    assert renamed.bos_id == renamed.eos_id
    renamed.save(tmp_path / "renamed")
    again = Tokenizer.load(tmp_path / "renamed")
    assert (again.bos_id, again.eos_id, again.pad_id) == (1, 1, 2)
    assert again.fingerprint == renamed.fingerprint != Tokenizer.load(file).fingerprint
    assert Tokenizer.load(tmp_path / "renamed", bos_token="<|bos|>").bos_id == 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}, (0, 1, 2)),
        ({"eos_token": {"content": "<|pad|>", "lstrip": False}}, (2, 2, 2)),
        ({"eos_token": "<|eos|>", "pad_token": None}, (1, 1, 1)),
        ({"model_max_length": 5}, (0, 1, 2)),
    ],
)
def test_the_names_of_a_transformers_folder(
    tmp_path: Path, names: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    found = Tokenizer.load(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id) == expected


def test_a_damaged_file_of_names_is_one_clear_error(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)


# --- tokenizers that change text ------------------------------------------------------------------

LOSSY = {
    "NFC": {"normalizer": normalizers.NFC()},
    "NFD": {"normalizer": normalizers.NFD()},
    "NFKC": {"normalizer": normalizers.NFKC()},
    "lower case": {"normalizer": normalizers.Lowercase()},
    "strip": {"normalizer": normalizers.Strip(left=False, right=True)},
    "accents": {"normalizer": normalizers.StripAccents()},
    "control characters": {
        "normalizer": normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False
        )
    },
    "quotes": {"normalizer": normalizers.Replace("``", '"')},
    "prefix": {"prefix_space": True},
}


@pytest.mark.parametrize("kind", LOSSY)
def test_a_tokenizer_that_changes_text_is_known_and_not_trained_with(
    tmp_path: Path, kind: str
) -> None:
    found = Tokenizer.load(write_folder(tmp_path, backend(END, **LOSSY[kind])))
    assert found.change is not None and " becomes " in found.change
    with pytest.raises(ValueError, match=r"changes text \(.* becomes .*\), so training would be"):
        found.require_lossless("training")


def test_bytes_without_a_token_are_lost_only_where_they_are(tmp_path: Path) -> None:
    """SmolLM2's vocabulary has such holes: control characters, parts of rare ones."""
    file = json.loads(backend(END).to_str())
    for byte in (0x04, 0xF1):
        token = byte_characters()[byte]
        file["model"]["vocab"][f"unused{token}"] = file["model"]["vocab"].pop(token)
    found = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(file)), **NAMED)
    assert found.lacks == {0x04, 0xF1} and found.change is None and not BYTES.lacks
    found.require_lossless("training", "a tab\t and a line\n", "more")
    with pytest.raises(ValueError, match="holds the byte 0xf1, for which"):
        found.require_lossless("training", "plain", "a\U00040000b")
    rows = [{"text": f"row {i} is long enough"} for i in range(20)] + [{"text": "a\x04b"}]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl:21: .* holds the byte 0x04.*--skip-bad"):
        prepare(str(source), tmp_path / "data", tokenizer=found)
    made = prepare(str(source), tmp_path / "data", tokenizer=found, skip_bad=True)
    assert made.num_left_out == 1


def test_other_ways_to_lose_text() -> None:
    splits = backend(END)
    splits.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), splits.pre_tokenizer]
    )
    assert Tokenizer(splits, **NAMED).change is not None
    strips = backend(END)
    strips.add_tokens([AddedToken("<tool>", lstrip=True)])
    assert Tokenizer(strips, **NAMED).change is not None


def test_what_a_program_asked_for_last_is_no_loss(tmp_path: Path) -> None:
    """Truncation and padding are saved in the file, and are none of the tokenizer's business."""
    made = backend(END, START_TURN)
    made.add_tokens([AddedToken("<tool>")])
    made.enable_truncation(4)
    made.enable_padding(length=16)
    found = Tokenizer.load(write_folder(tmp_path, made, tokenizer_config={"eos_token": END}))
    assert found.change is None and len(found.encode("a text of letters")) > 10
    assert BYTES.change is None and BPE.change is None


def test_facts_of_a_folder_are_kept_beside_the_file(tmp_path: Path) -> None:
    theirs = Tokenizer.load(write_chat_folder(tmp_path / "theirs"))
    theirs.save(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        found = Tokenizer.load(tmp_path / folder)
        assert found.chat_template == CHATML and found.end_ids == {258, 260}
        assert found.sampling == {"temperature": 0.6, "top_k": 50, "top_p": 0.9}
        assert found.fingerprint == theirs.fingerprint and found.begin_ids == ()
    assert BPE.sampling == {} and BPE.settings == {} and BPE.generation == {}
    assert BPE.begin_ids == (BPE.bos_id,) and BPE.end_ids == {BPE.eos_id}


def test_named_templates_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    settings = {"eos_token": END, "chat_template": named}
    folder = write_folder(tmp_path / "a", backend(END), tokenizer_config=settings)
    assert Tokenizer.load(folder).chat_template == CHATML
    Tokenizer.load(folder).save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").settings["chat_template"] == named


# --- special tokens on request --------------------------------------------------------------------


@pytest.mark.parametrize(("lstrip", "rstrip"), [(False, False), (True, False), (True, True)])
def test_marks_are_read_as_by_the_library(lstrip: bool, rstrip: bool) -> None:
    made = backend(END)
    added = [AddedToken(n, special=True, lstrip=lstrip, rstrip=rstrip) for n in ("<a>", "<a><b>")]
    made.add_special_tokens(added)
    library = tokenizers.Tokenizer.from_str(made.to_str())
    ours = Tokenizer(made, **NAMED)
    for text in ("", "<a>", "x <a> y", "<a><b>\n the<a>", f"{END}  <b> <a>", "<a", " <a><a> \n"):
        assert ours.encode(text, special=True) == library.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_prompts_begin_as_texts_do() -> None:
    ids = BPE.encode("the")
    assert BPE.encode_prompt("the") == [BPE.bos_id, *ids]
    assert BPE.encode_prompt(f"{BOS_TOKEN}the", special=True) == [BPE.bos_id, *ids]
    plain = Tokenizer(backend(END), **NAMED)
    assert plain.encode_prompt("the") == plain.encode("the")
    assert plain.encode_prompt("") == [plain.bos_id]


def test_files_of_the_first_versions_begin_texts_as_before(tmp_path: Path) -> None:
    path = BPE.save(tmp_path)
    file = json.loads(path.read_text())
    file["post_processor"] = None
    path.write_text(json.dumps(file))
    assert Tokenizer.load(path).begin_ids == (BPE.bos_id,)
