import dataclasses
import json

import numpy as np
import pytest

from openmythos.data.index import read_index, token_dtype
from openmythos.data.prepare import prepare
from openmythos.tokenizer import Tokenizer, byte_tokenizer, train_bpe


@pytest.fixture
def prepared(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"paragraph {i} " * 40 for i in range(40)))
    return prepare(str(file), tmp_path / "out", tokenizer=byte_tokenizer())


def test_index_is_read_back_as_it_was_written(prepared):
    assert read_index(prepared.folder) == prepared
    assert prepared.load_tokenizer().fingerprint == byte_tokenizer().fingerprint


def test_dtype_follows_the_vocabulary():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_damage_is_found_and_named(prepared):
    shard = prepared.folder / prepared.splits["train"].shards[0].file
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    prepared.check_files("train", checksums=False)
    with pytest.raises(ValueError, match=r"train-00000\.bin does not match its SHA-256; prepare"):
        prepared.check_files("train", checksums=True)
    shard.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=rf"has {len(data) - 2} bytes instead of {len(data)}"):
        prepared.check_files("train", checksums=False)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.bin is missing"):
        prepared.check_files("train", checksums=False)


def test_another_tokenizer_is_refused(prepared):
    other = train_bpe(["some text some text"], 262)
    other.save((prepared.folder / prepared.tokenizer_file).parent)
    with pytest.raises(ValueError, match=r"tokenizer\.json does not match its SHA-256"):
        prepared.load_tokenizer()
    older = dataclasses.replace(prepared, tokenizer_sha256={})
    with pytest.raises(ValueError, match="tokenizer mismatch"):
        older.load_tokenizer()


def test_every_file_of_a_tokenizer_has_a_checksum(tmp_path):
    """The begin token and the chat template are no part of the fingerprint."""
    text, template = tmp_path / "text.txt", {"chat_template": "{{ messages }}"}
    text.write_text("a line of text\n\n" * 100)
    byte_tokenizer().save(tmp_path / "chat")
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(template))
    tokenizer = Tokenizer.load(tmp_path / "chat")
    data = prepare(str(text), tmp_path / "out", tokenizer=tokenizer)
    assert data.load_tokenizer().chat_template == "{{ messages }}"
    files = sorted((data.folder / data.tokenizer_file).parent.glob("*.json"))
    assert {file.name for file in files} >= {"tokenizer.json", "tokenizer_config.json"}
    for file in files:
        content = file.read_text()
        file.write_text(content + " ")
        with pytest.raises(ValueError, match=rf"{file.name} does not match its SHA-256"):
            data.load_tokenizer()
        file.unlink()
        with pytest.raises(ValueError, match=rf"{file.name} is missing"):
            data.load_tokenizer()
        file.write_text(content)


def test_every_change_of_the_index_is_refused(prepared):
    path = prepared.folder / "index.json"
    index = json.loads(path.read_text())
    for name in index:
        path.write_text(json.dumps({**index, name: "another"}))
        with pytest.raises(ValueError, match="cannot use"):
            read_index(prepared.folder)
    index["splits"]["val"]["num_bytes"] += 1  # what bits per byte are divided by
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not match its own sha256; prepare the data again"):
        read_index(prepared.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "its format is not 'openmythos-tokens'"),
        ({"format_version": 99}, "its format_version is not 1"),
        ({"splits": None}, "cannot use"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_an_index_that_is_not_ours_is_refused(prepared, change, message):
    path = prepared.folder / "index.json"
    index = json.loads(path.read_text())
    del index["sha256"]
    path.write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=message):
        read_index(prepared.folder)


def test_no_index(tmp_path):
    with pytest.raises(ValueError, match=r"is not prepared data: it has no index\.json"):
        read_index(tmp_path)
