import gzip
import io
import json
import os
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openmythos.data.file import Document, LeftOut
from openmythos.data.prepare import prepare
from openmythos.data.source import load_documents, read_source, source_version


def names(source, **options):
    return [document.name for document in load_documents(str(source), **options)]


def texts(source, **options):
    return [document.text for document in load_documents(str(source), **options)]


def test_text_file_is_one_document_unchanged(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("line\r\nzwei é\n".encode())
    assert list(load_documents(str(file))) == [Document("a.txt", "line\r\nzwei é\n")]


def test_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ["b.md", "sub/a.txt", "c.py", "d.rst", "e.json", "sub/tests/t.py", "empty.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    for skipped in [".git/x.txt", "site-packages/x.py", "__pycache__/x.py", ".hidden.txt"]:
        (tmp_path / skipped).parent.mkdir(exist_ok=True)
        (tmp_path / skipped).write_text("skipped")
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}\n')
    assert names(tmp_path) == [
        *["b.md", "c.py", "d.rst", "rows.jsonl:1", "sub/a.txt", "sub/tests/t.py"]
    ]


def test_jsonl_rows(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "body": "eins"}\n\n{"text": null, "body": "zwei"}\n')
    assert list(load_documents(str(file))) == [Document("a.jsonl:1", "one")]
    assert texts(file, column="body") == ["eins", "zwei"]


def test_parquet_rows(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), file)
    assert list(load_documents(str(file))) == [
        Document("a.parquet:1", "one"),
        Document("a.parquet:3", "two"),
    ]
    with pytest.raises(ValueError, match=r"no column 'body'; its columns are: text, id"):
        texts(file, column="body")
    with pytest.raises(ValueError, match=r"row 1 column 'id' holds a whole number, not text"):
        texts(file, column="id")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl is empty"),
        (b'{"text": "fine"}\n{"text": \n', "a.jsonl line 2 is not JSON: .* at column"),
        (b'{"text": "fine"}\n{"text": "\xff"}\n', "a.jsonl is not UTF-8: byte 0xff at offset 27"),
        (b"[1]\n", "line 1 is a list, not an object with a 'text' column"),
        (b'{"body": "x", "n": 1}\n', "line 1 has no column 'text'; its columns are: body, n"),
        (b'{"text": 3}\n', "line 1 column 'text' holds a whole number, not text"),
    ],
)
def test_jsonl_errors(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(file)


def test_file_errors(tmp_path):
    empty, latin, binary = tmp_path / "e.txt", tmp_path / "l.txt", tmp_path / "p.parquet"
    empty.touch()
    latin.write_bytes("abc é".encode("latin-1"))
    binary.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"e\.txt is empty"):
        texts(empty)
    with pytest.raises(ValueError, match=r"l\.txt is not UTF-8: byte 0xe9 at offset 4"):
        texts(latin)
    with pytest.raises(ValueError, match=r"p\.parquet is not a parquet file"):
        texts(binary)
    with pytest.raises(ValueError, match=r"unknown source 'nowhere'.*'python-docs'"):
        load_documents("nowhere")
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"cannot read .*x\.pdf: files end in \.txt"):
        load_documents(str(tmp_path / "x.pdf"))


def test_a_named_file_without_an_ending_is_text(tmp_path):
    (tmp_path / "text8").write_text("anarchism originated")
    (tmp_path / "text8.gz").write_bytes(gzip.compress(b"anarchism originated"))
    (tmp_path / "a.txt").write_text("other")
    assert texts(tmp_path / "text8") == texts(tmp_path / "text8.gz") == ["anarchism originated"]
    assert texts(tmp_path) == ["other"]  # in a folder it may be anything
    for name in ("a.tar.gz", "a.parquet.gz", "a.7z"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match="cannot read"):
            texts(tmp_path / name)


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="no files to read in"):
        texts(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"all 1 files in .* are empty"):
        texts(tmp_path)


def left_out(source):
    return [item for item in read_source(str(source)) if isinstance(item, LeftOut)]


def test_a_folder_goes_on_after_what_it_cannot_read(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.jsonl").write_text('{"text": "two"}\n{"te')
    (tmp_path / "d.txt").symlink_to("missing")
    (tmp_path / "e.txt").write_text("three")
    items = list(read_source(str(tmp_path)))
    assert [item.text for item in items if isinstance(item, Document)] == ["one", "two", "three"]
    assert [item.reason.split(" ")[0] for item in items if isinstance(item, LeftOut)] == [
        str(tmp_path / name) for name in ("b.txt", "c.jsonl", "d.txt")
    ]
    assert all(item.is_bad for item in left_out(tmp_path))
    assert source_version(str(tmp_path)) == source_version(str(tmp_path))
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        texts(tmp_path)


def test_tables_in_a_folder_may_be_something_else(tmp_path):
    (tmp_path / "rows.csv").write_text("text\none\n")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "tsconfig.json").write_text("// comments\n{}")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    (tmp_path / "paper.pdf").write_bytes(b"x")
    (tmp_path / "more.pdf").write_bytes(b"x")
    assert texts(tmp_path) == ["one"]
    found = left_out(tmp_path)
    assert not any(item.is_bad for item in found)
    assert [item.reason.removeprefix(f"{tmp_path}/") for item in found] == [
        "3 files of other kinds (.pdf .jpg)",
        "package.json has no column 'text'; its columns are: name: choose one with --column",
        "tsconfig.json is not JSON: Expecting value at line 1 column 1",
    ]
    (tmp_path / "rows.csv").unlink()
    with pytest.raises(ValueError, match=r"hold no \.txt|are empty.*\(left out: 3 files of other"):
        texts(tmp_path)


def test_our_own_folders_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"word{i}" for i in range(2000)))
    alone = texts(tmp_path), source_version(str(tmp_path))
    prepare(str(tmp_path / "a.txt"), tmp_path / "shards", vocab_size=300)
    for folder in ("runs/x/checkpoints/step-00000001", "runs/x/samples", "export"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs" / "x" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"")
    (tmp_path / "export" / "modeling.py").write_text("code")
    assert (texts(tmp_path), source_version(str(tmp_path))) == alone
    assert sorted(item.reason for item in left_out(tmp_path)) == [
        f"{tmp_path / 'export'} is a checkpoint",
        f"{tmp_path / 'runs' / 'x'} is a run",
        f"{tmp_path / 'shards'} is prepared data",
    ]
    with pytest.raises(ValueError, match="x is a run, not text: give a folder of text"):
        load_documents(str(tmp_path / "runs" / "x"))
    with pytest.raises(ValueError, match="shards is prepared data, not text: give it to `train"):
        load_documents(str(tmp_path / "shards"))


def test_a_folder_of_that_form_by_chance_is_read(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.json").write_text('{"text": "mine"}')
    (tmp_path / "site" / "config.json").write_text('{"text": "yours"}')
    assert texts(tmp_path) == ["yours", "mine"]


def test_standard_input_is_one_text(monkeypatch):
    def given(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    given("\ufeffone\r\n\r\nzwei é".encode())
    assert list(load_documents("-")) == [Document("standard input", "one\r\n\r\nzwei é")]
    assert source_version("-") == "-"
    given(b"")
    with pytest.raises(ValueError, match="standard input is empty"):
        texts("-")
    given(b"\xff")
    with pytest.raises(ValueError, match="standard input is not UTF-8: byte 0xff at offset 0"):
        texts("-")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        texts(tmp_path / "a.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library, with nothing of this machine's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a@set").mkdir()  # no revision: it is a folder
    return tmp_path / "a@set"


def test_a_dataset_is_streamed(hub):
    for part in range(2):
        rows = {"text": [f"{part}.{i}" for i in range(100)] + [None], "id": list(range(101))}
        table = pa.table({"other": [b"x"] * 101, **rows})
        path = hub / f"train-0000{part}-of-00002.parquet"
        pq.write_table(table, path, row_group_size=40, compression="zstd")
    found = list(load_documents(f"hf:{hub}"))
    assert found[0] == Document(f"hf:{hub}:0", "0.0") and len(found) == 200
    assert [item.text for item in found[99:101]] == ["0.99", "1.0"]
    with pytest.raises(ValueError, match="no column 'body'; its columns are: other, text, id"):
        texts(f"hf:{hub}", column="body")
    with pytest.raises(ValueError, match="column 'id' holds a whole number, not text"):
        texts(f"hf:{hub}", column="id")


def test_a_dataset_of_other_files(hub):
    rows = [{"text": "one", "n": 1}, {"text": "", "n": 2}, {"text": "two", "n": 3}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (hub / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert list(load_documents(f"hf:{hub}")) == [
        Document(f"hf:{hub}:0", "one"),
        Document(f"hf:{hub}:2", "two"),
    ]
    with pytest.raises(ValueError, match="no column 'body'; its columns are: text, n"):
        texts(f"hf:{hub}", column="body")


def test_dataset_errors_are_one_line(hub, monkeypatch):
    (hub / "train.jsonl").write_text('{"text": "one"}\n{"te')
    with pytest.raises(ValueError, match=f"cannot stream hf:{hub}: ") as damaged:
        texts(f"hf:{hub}")
    (hub / "train.jsonl").rename(hub / "test.jsonl")
    with pytest.raises(ValueError, match=r"cannot stream .*train") as absent:
        texts(f"hf:{hub}")
    with pytest.raises(ValueError, match=r"cannot stream hf:.*nowhere") as nowhere:
        texts(f"hf:{hub / 'nowhere'}")
    for caught in (damaged, absent, nowhere):
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="names no dataset"):
        load_documents("hf:")
    with pytest.raises(ValueError, match="'hf:owner/name@' names no revision"):
        load_documents("hf:owner/name@")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the datasets package: pip install datasets"):
        load_documents("hf:x")


def test_parquet_is_read_a_little_at_a_time(tmp_path):
    """A row group larger than what is read at once stays on the disk, as do other columns."""
    noise = np.random.default_rng(0).integers(32, 127, 2**20, dtype=np.uint8).tobytes().decode()
    rows = [f"{i:04}" + noise[i * 997 : i * 997 + 20_000] for i in range(800)]
    table = pa.table({"text": rows, "other": rows})
    pages = {"use_dictionary": False, "write_batch_size": 16}  # 2**20 bytes each
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=800, **pages)
    del table
    before = pa.total_allocated_bytes()
    most, count = 0, 0
    for number, document in enumerate(load_documents(str(tmp_path / "a.parquet"))):
        most = max(most, pa.total_allocated_bytes() - before)
        count += document.text == rows[number]
    assert count == 800
    assert most < 5 * 2**20 < sum(map(len, rows)) // 3  # 25 MB without these settings


def test_version_changes_with_the_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = source_version(str(tmp_path)), source_version(str(file))
    assert before == (source_version(str(tmp_path)), source_version(str(file)))
    os.utime(file, ns=(1, 1))
    assert before[0] != source_version(str(tmp_path)) and before[1] != source_version(str(file))
    assert source_version("hf:x") == "hf:x"
    assert sys.version.split()[0] in source_version("python-docs")


@pytest.fixture(scope="module")
def python_docs():
    return list(load_documents("python-docs"))


@pytest.mark.slow
def test_python_docs_are_megabytes_of_prose(python_docs):
    size = sum(len(document.text.encode()) for document in python_docs)
    assert 1_000_000 < size < 4_000_000
    assert len({document.name for document in python_docs}) == len(python_docs) > 400
    by_name = {document.name: document.text for document in python_docs}
    assert "Utility functions for copying and archiving" in by_name["shutil"]
    assert by_name["topic:compound"].startswith("Compound statements\n***")
    assert not any(name.startswith("test.") for name in by_name)


def test_python_docs_say_nothing_twice(python_docs):
    """No paragraph of one document in another: a split by document leaks none into validation."""
    home = {}
    repeated = 0
    for document in python_docs:
        paragraphs = {" ".join(p.split()) for p in re.split(r"\n[ \t]*\n", document.text)}
        paragraphs.discard("")
        repeated += sum(home.setdefault(p, document.name) != document.name for p in paragraphs)
    assert repeated <= 5  # none on Python 3.11; elsewhere topics might share a heading


def test_python_docs_share_hardly_any_long_run_of_text(python_docs):
    train, val = set(), []
    for number, document in enumerate(python_docs):
        text = " ".join(document.text.split())
        if number % 10 == 3:
            val += [text[i : i + 50] for i in range(0, len(text) - 50, 25)]
        else:
            train.update(text[i : i + 50] for i in range(len(text) - 50))
    assert len(val) > 2000
    assert sum(window in train for window in val) / len(val) < 0.005


def test_python_docs_run_no_code(python_docs):
    assert "antigravity" not in sys.modules  # a module that opens a browser when imported


def test_python_source_is_the_library_without_its_tests():
    documents = {document.name: document.text for document in load_documents("python-source")}
    assert sum(map(len, documents.values())) > 5_000_000
    assert "class JSONDecoder" in documents["json/decoder.py"]
    assert not [n for n in documents if re.search(r"(^|/)(tests?|site-packages)/", n)]
    assert list(documents) == sorted(documents)
    json.dumps(documents["json/decoder.py"])
