import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from openmythos.data.index import read_index
from openmythos.data.prepare import prepare
from openmythos.tokenizer import Tokenizer, byte_tokenizer


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(f"Document {i} says {i * i} — é.\n\n" * (i % 5 + 1))
    return folder


def stored_documents(data, split):
    """Text of each stored document, decoded through the files alone."""
    index = data.splits[split]
    shards = [np.fromfile(data.folder / shard.file, dtype=data.dtype) for shard in index.shards]
    tokens = np.concatenate(shards) if shards else np.empty(0, dtype=data.dtype)
    offsets = np.fromfile(data.folder / index.document_offsets.file, dtype=np.int64)
    tokenizer = data.load_tokenizer()
    assert offsets[0] == 0 and offsets[-1] == len(tokens) == index.num_tokens
    assert len(offsets) == index.num_documents + 1
    texts = []
    for start, stop in itertools.pairwise(offsets.tolist()):
        ids = tokens[start:stop].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        texts.append(tokenizer.decode(ids[1:-1]))
    assert sum(len(text.encode()) for text in texts) == index.num_bytes
    assert int(tokenizer.token_num_bytes[tokens].sum()) == index.num_bytes
    return texts


def test_every_document_is_stored_once_in_one_split(corpus, tmp_path):
    data = prepare(str(corpus), tmp_path / "out", vocab_size=300)
    train, val = stored_documents(data, "train"), stored_documents(data, "val")
    assert sorted(train + val) == sorted(file.read_text() for file in corpus.iterdir())
    assert 1 <= len(val) <= 15
    assert data.dtype == "uint16"
    assert train != sorted(train)


def test_same_arguments_give_the_same_bytes(corpus, tmp_path):
    one = prepare(str(corpus), tmp_path / "one", vocab_size=300)
    two = prepare(str(corpus), tmp_path / "two", vocab_size=300)
    assert one.splits == two.splits
    assert (one.folder / "index.json").read_bytes() == (two.folder / "index.json").read_bytes()
    other = prepare(str(corpus), tmp_path / "three", vocab_size=300, seed=1)
    assert set(stored_documents(other, "val")) != set(stored_documents(one, "val"))


def test_more_documents_move_none_across_the_split(corpus, tmp_path):
    before = prepare(str(corpus), tmp_path / "one", tokenizer=byte_tokenizer())
    for i in range(30):
        (corpus / f"a{i}.txt").write_text(f"Something new, number {i}.")
    (corpus / "00.txt").rename(corpus / "renamed.txt")
    after = prepare(str(corpus), tmp_path / "two", tokenizer=byte_tokenizer())
    assert set(stored_documents(before, "val")) <= set(stored_documents(after, "val"))
    assert set(stored_documents(before, "train")) <= set(stored_documents(after, "train"))


def test_equal_documents_are_stored_once(corpus, tmp_path):
    for i in range(60):
        (corpus / f"copy{i}.txt").write_bytes((corpus / f"{i:02d}.txt").read_bytes())
    data = prepare(str(corpus), tmp_path / "out", tokenizer=byte_tokenizer())
    texts = stored_documents(data, "train") + stored_documents(data, "val")
    assert len(texts) == len(set(texts)) == 60
    assert data.num_duplicates == 60


def test_shards_split_the_stream_and_change_nothing(corpus, tmp_path):
    whole = prepare(str(corpus), tmp_path / "whole", tokenizer=byte_tokenizer())
    parts = prepare(str(corpus), tmp_path / "p", tokenizer=byte_tokenizer(), max_shard_tokens=100)
    sizes = [shard.num_items for shard in parts.splits["train"].shards]
    assert len(sizes) > 10 and set(sizes[:-1]) == {100}
    assert stored_documents(parts, "train") == stored_documents(whole, "train")


def test_one_long_file_is_cut_at_blank_lines(tmp_path):
    text = "".join(f"{i}: a line of verse\nand a second é\n\n" for i in range(2000))
    (tmp_path / "verse.txt").write_text(text)
    data = prepare(str(tmp_path / "verse.txt"), tmp_path / "out", tokenizer=byte_tokenizer())
    pieces = stored_documents(data, "train") + stored_documents(data, "val")
    assert len(pieces) > 40 and data.splits["val"].num_documents > 1
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert sorted("".join(pieces)) == sorted(text)


def numbered(form, count):
    return "".join(form.format(i) for i in range(count))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (numbered("word{} ", 9000), " "),  # text8: one line
        (numbered("This is said {} times, or v1.2. ", 2000), ". "),
        (numbered("第{}句话没有空格。", 2000), "。"),
        (numbered("{} a line\r\nand another\r\n\r\n", 2000), "\r\n\r\n"),
        (numbered("{} a line\nand another\n \t\n", 2000), "\n \t\n"),
        (numbered("{} a line\rand another\r\r", 2000), "\r\r"),
        (numbered("{} a line and a CRLF\r\n", 2000), "CRLF\r\n"),
        ("".join(chr(0x4E00 + i) for i in range(9000)), ""),  # no boundary at all
        (numbered("{} is short. ", 50), ". "),
        (numbered("{}", 20), ""),
    ],
)
def test_text_of_any_form_is_cut_at_the_best_places(tmp_path, text, end):
    file = tmp_path / "one.txt"
    file.write_bytes(text.encode())
    data = prepare(str(file), tmp_path / "out", tokenizer=byte_tokenizer())
    train, val = stored_documents(data, "train"), stored_documents(data, "val")
    assert train and val and len(train) + len(val) >= 5
    assert sorted("".join(train + val)) == sorted(text)
    assert all(piece in text for piece in train + val)
    assert all(piece.endswith(end) for piece in train + val if not text.endswith(piece))
    assert max(len(piece.encode()) for piece in train + val) < 2 * max(1024, len(text.encode()) / 8)


def test_a_document_longer_than_the_held_out_share_is_cut(corpus, tmp_path):
    (corpus / "novel.txt").write_text(numbered("Sentence {}. ", 5000))
    data = prepare(str(corpus), tmp_path / "out", tokenizer=byte_tokenizer())
    train, val = stored_documents(data, "train"), stored_documents(data, "val")
    assert {file.read_text() for file in corpus.glob("[0-9]*.txt")} < set(train + val)
    for split in (train, val):
        assert any(piece.startswith("Sentence ") for piece in split)


def test_one_character_cannot_be_split_but_can_be_kept_whole(tmp_path):
    (tmp_path / "one.txt").write_text("é")
    with pytest.raises(ValueError, match=r"says one thing only .* cannot be split into train and"):
        prepare(str(tmp_path / "one.txt"), tmp_path / "out", tokenizer=byte_tokenizer())
    assert not any((tmp_path / "out").iterdir())
    data = prepare(
        str(tmp_path / "one.txt"), tmp_path / "out", tokenizer=byte_tokenizer(), val_fraction=0.0
    )
    assert stored_documents(data, "train") == ["é"]
    assert stored_documents(data, "val") == []


def test_the_tokenizer_sees_the_training_split_only(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{chr(0x4E00 + i) * 50} {i}")
    data = prepare(str(folder), tmp_path / "out", vocab_size=2000)
    tokenizer = data.load_tokenizer()
    learnt = [c for i in range(40) if len(tokenizer.encode(c := chr(0x4E00 + i))) == 1]
    assert set(learnt) == {text[0] for text in stored_documents(data, "train")}


def test_ready_data_is_reused_until_something_changes(corpus, tmp_path):
    out = tmp_path / "out"
    first = prepare(str(corpus), out, vocab_size=300)
    assert not first.reused
    assert prepare(str(corpus), out, vocab_size=300).reused
    assert not prepare(str(corpus), out, vocab_size=301).reused
    (corpus / "new.txt").write_text("new")
    changed = prepare(str(corpus), out, vocab_size=301)
    assert not changed.reused
    assert sorted(p.name for p in out.iterdir()) == [
        changed.tokenizer_file.split("/")[0],
        "index.json",
    ]


def test_damaged_data_is_made_again(corpus, tmp_path):
    data = prepare(str(corpus), tmp_path / "out", vocab_size=300)
    shard = data.folder / data.splits["val"].shards[0].file
    shard.write_bytes(b"\0" * shard.stat().st_size)
    again = prepare(str(corpus), tmp_path / "out", vocab_size=300)
    assert not again.reused
    again.check_files("val", checksums=True)


def test_other_peoples_files_are_left_alone(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex"):
        prepare(str(corpus), tmp_path / "out")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        prepare(str(corpus), corpus / "00.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 10}, "vocab_size is 10; it must be at least 259"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; it must be 0"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1; it must be 0"),
        ({"seed": -1}, "seed is -1; it must be an integer in 0..18446744073709551615"),
        ({"max_shard_tokens": 0}, "max_shard_tokens=0 is too small"),
    ],
)
def test_arguments_out_of_range(corpus, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(str(corpus), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_errors_in_the_source_leave_the_old_data(corpus, tmp_path):
    old = prepare(str(corpus), tmp_path / "out", vocab_size=300)
    (corpus / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8"):
        prepare(str(corpus), tmp_path / "out", vocab_size=300)
    assert read_index(tmp_path / "out") == old
    with pytest.raises(ValueError, match="unknown source"):
        prepare("nowhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_read_is_left_out_on_request_and_counted(corpus, tmp_path):
    (corpus / "bad.txt").write_bytes(b"\xff")
    (corpus / "copy.txt").write_bytes((corpus / "00.txt").read_bytes())
    rows = ['{"text": "a lone surrogate: \\ud800, and ? is none"}', '{"te', '{"text": 3}']
    (corpus / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8.*--skip-bad.*skip_bad=true"):
        prepare(str(corpus), tmp_path / "out", tokenizer=byte_tokenizer())
    data = prepare(str(corpus), tmp_path / "out", tokenizer=byte_tokenizer(), skip_bad=True)
    texts = stored_documents(data, "train") + stored_documents(data, "val")
    assert len(texts) == 61 and "a lone surrogate: ?, and ? is none" in texts
    assert (data.num_duplicates, data.num_replaced, data.num_left_out) == (1, 1, 3)
    said = data.summary()
    assert said.startswith("61 documents, 1 duplicates dropped, 1 characters replaced, 3 left out:")
    assert all(part in said for part in ("bad.txt is not UTF-8", "line 2 is not JSON", "line 3"))
    again = prepare(str(corpus), tmp_path / "out", tokenizer=byte_tokenizer(), skip_bad=True)
    assert again.reused and again.summary() == said


def test_a_summary_shows_the_first_reasons(tmp_path):
    rows = [json.dumps({"text": f"fine {i}"}) for i in range(40)] + ["bad"] * 300
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    data = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=300, skip_bad=True)
    assert data.num_left_out == 300 and len(data.left_out) == 100
    assert data.summary().endswith("is not JSON: Expecting value at column 1; and 295 more")


def test_data_of_an_older_version_is_read(corpus, tmp_path):
    data = prepare(str(corpus), tmp_path / "out", vocab_size=300)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for name in ("num_replaced", "num_left_out", "left_out", "tokenizer_sha256", "sha256"):
        del index[name]
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    assert read_index(tmp_path / "out") == dataclasses.replace(data, tokenizer_sha256={})


def test_standard_input_is_read_every_time(tmp_path, monkeypatch):
    for word in ("one", "two"):
        text = f"{word} said. " * 400
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        data = prepare("-", tmp_path / "out", tokenizer=byte_tokenizer(), val_fraction=0.0)
        assert not data.reused and stored_documents(data, "train") == [text]


# Ends its own process, as a kill would, at the n-th thing that it does to the file system.
KILLED = """
import os, sys
from openmythos.data.prepare import prepare
limit, seen = int(sys.argv[3]), 0
def hook(event, args):
    global seen
    writes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
    if writes or event == "open" and args[1] in ("w", "wb"):
        seen += 1
        if seen == limit:
            os._exit(9)
sys.addaudithook(hook)
prepare(sys.argv[1], sys.argv[2], vocab_size=300, seed=1)
print(seen)
"""


def run_killed(corpus, out, limit):
    command = [sys.executable, "-c", KILLED, str(corpus), str(out), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_the_old_data_or_the_new(corpus, tmp_path):
    out = tmp_path / "out"
    old = prepare(str(corpus), out, vocab_size=300)
    new = prepare(str(corpus), tmp_path / "new", vocab_size=300, seed=1)
    for limit in range(1, 60):
        done = run_killed(corpus, out, limit)
        found = read_index(out)
        found.load_tokenizer()
        for split in ("train", "val"):
            found.check_files(split, checksums=True)
        assert found.splits in (old.splits, new.splits)
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        if found.splits == new.splits:
            prepare(str(corpus), out, vocab_size=300)  # back to the old, to be killed later
    assert done.returncode == 0
    assert found.splits == new.splits
    assert sorted(p.name.split("-")[0] for p in out.iterdir()) == ["data", "index.json"]


def test_a_first_run_that_was_killed_can_be_repeated(corpus, tmp_path):
    assert run_killed(corpus, tmp_path / "out", 4).returncode == 9
    assert any((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="is not prepared data"):
        read_index(tmp_path / "out")
    data = prepare(str(corpus), tmp_path / "out", vocab_size=300)
    assert stored_documents(data, "train")
    assert [p.name for p in (tmp_path / "out").glob(".*")] == []


@pytest.mark.parametrize("num_bytes", [0, 2_000, 5_000])
def test_a_full_disk_leaves_the_old_data_and_is_named(corpus, tmp_path, num_bytes):
    resource = pytest.importorskip("resource")
    old = prepare(str(corpus), tmp_path / "out", vocab_size=300)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/out/.* cannot be written: file too large"):
            prepare(str(corpus), tmp_path / "out", vocab_size=300, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_index(tmp_path / "out") == old
    assert [p.name for p in (tmp_path / "out").glob(".*")] == []
    assert prepare(str(corpus), tmp_path / "out", vocab_size=300).reused


def test_preparing_needs_no_torch():
    code = "import sys, openmythos.data.prepare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_saved_tokenizer_is_the_given_one(corpus, tmp_path):
    data = prepare(str(corpus), tmp_path / "out", tokenizer=byte_tokenizer())
    assert data.settings["vocab_size"] is None
    loaded = Tokenizer.load(os.fspath(data.folder / data.tokenizer_file))
    assert loaded.fingerprint == byte_tokenizer().fingerprint == data.tokenizer_fingerprint
