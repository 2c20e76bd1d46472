import bz2
import codecs
import csv
import gzip
import json
import lzma
import os
import re
import sys
from pathlib import Path

import pyarrow
import pytest

from openmythos.data.file import COMPRESSED_SUFFIXES, Document, LeftOut, file_kind, read_file

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}
ROWS = ["one é", "two, with a comma", 'three "quoted"\nand a line']
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in ROWS)
CUT = gzip.compress(b"abc" * 99, mtime=0)[:-4]  # of no date: the name of a test is made of it


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path, column: str = "text") -> list[str]:
    items = list(read_file(path, path.name, column))
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items if isinstance(item, Document)]


def read(path: Path, column: str = "text") -> list[str]:
    """Texts, and reasons in brackets for what is left out."""
    items = read_file(path, path.name, column)
    return [f"[{i.reason}]" if isinstance(i, LeftOut) else i.text for i in items]


def as_csv(path: Path, delimiter: str) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(ROWS))
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"),
        ("A.TXT.GZ", ".txt"),
        ("a.b.jsonl.zst", ".jsonl"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.tar.gz", None),
        ("txt", None),
        ("a.pdf", None),
    ],
)
def test_the_kind_of_a_file(name: str, kind: str | None) -> None:
    assert file_kind(Path(name)) == kind


@pytest.mark.parametrize("compression", ["", *COMPRESSED_SUFFIXES])
def test_every_format_gives_the_same_rows(tmp_path: Path, compression: str) -> None:
    contents = {
        ".jsonl": JSONL,
        ".json": json.dumps([{"text": text, "n": 1} for text in ROWS], indent=2),
        ".csv": as_csv(tmp_path / "plain.csv", ","),
        ".tsv": as_csv(tmp_path / "plain.tsv", "\t"),
    }
    compress = COMPRESS.get(compression, bytes)
    for suffix, content in contents.items():
        path = write(tmp_path / f"a{suffix}{compression}", compress(content.encode()))
        assert [text.replace("\r\n", "\n") for text in texts(path)] == ROWS
    text = write(tmp_path / f"a.txt{compression}", compress("whole\r\né".encode()))
    assert texts(text) == ["whole\r\né"]
    if compression:  # several streams in one file, as parallel compressors write them
        parts = compress(b"first ") + compress(b"second")
        assert texts(write(tmp_path / f"b.txt{compression}", parts)) == ["first second"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_byte_order_marks_are_no_text(
    tmp_path: Path, suffix: str, mark: bytes, encoding: str
) -> None:
    content = {
        ".txt": "grün \u0a0a漢",
        ".jsonl": '{"text": "grün \u0a0a漢"}\n{"text": "b"}\n',
        ".json": '[{"text": "grün \u0a0a漢"}, {"text": "b"}]',
        ".csv": "text\ngrün \u0a0a漢\nb\n",
    }[suffix]
    path = write(tmp_path / f"a{suffix}", mark + content.encode(encoding))
    assert texts(path)[0] == "grün \u0a0a漢"


def test_a_mark_inside_a_row_is_no_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", '{"text": "\\ufeffa\\ufeffb"}')) == ["a\ufeffb"]


def test_json_as_one_object_or_one_per_line(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.json", '{\n  "text": "only"\n}')) == ["only"]
    assert texts(write(tmp_path / "b.json", JSONL)) == ROWS
    assert texts(write(tmp_path / "c.json", "[]")) == []


def test_long_fields_of_csv(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert texts(write(tmp_path / "a.csv", "text\n" + "x" * 200_000)) == ["x" * 200_000]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            b'{"text": "one"}\n{"te\n[1]\n{"text": 3}\n{"text": "\xff"}\n{"text": "two"}\n',
            [
                *[
                    "one",
                    "line 2 is not JSON",
                    "line 3 is a list",
                    "holds a whole number, not text",
                ],
                *["not UTF-8: byte 0xff at offset 47", "two"],
            ],
        ),
        ("a.jsonl", b"[" * 100_000, ["line 1 cannot be read as JSON"]),
        ("a.json", b'{"text": 1' + b"0" * 5000 + b"}", ["cannot be read as JSON: Exceeds"]),
        ("a.json", b'{\n"text": ', ["is not JSON: Expecting value at line 2 column 9"]),
        ("a.json", b'{"name": "x"}', ["no column 'text'; its columns are: name: .* --column"]),
        ("a.json", b'[{"text": "a"}, {"b": 1}]', ["a", "row 2 has no column 'text'"]),
        ("a.csv", b"id,body\n1,x\n", ["no column 'text'; its columns are: id, body"]),
        ("a.csv", b"id,text\n1,a\n2,b, c\n3,d\n", ["a", "row 2 has more fields", "d"]),
        ("a.csv", b'text\na\n"never closed\nb\n', ["a", "is not CSV after line 2"]),
        ("a.csv", b"text\na\n\xff\n", ["a", "not UTF-8: byte 0xff at offset 7"]),
        ("a.csv", b"", []),
        ("a.txt", codecs.BOM_UTF16_LE + b"abc", ["the mark of UTF-16 but is not: truncated"]),
        ("a.txt", codecs.BOM_UTF8 + b"ab\xff", ["byte 0xff at offset 5"]),
        ("a.txt.gz", b"not compressed", ["cannot be read: Not a gzipped file"]),
        ("a.txt.gz", CUT, ["cannot be read: Compressed file ended"]),
        ("a.txt.bz2", b"not compressed", ["cannot be read: Invalid data"]),
        ("a.txt.xz", b"not compressed", ["cannot be read: Input format not supported"]),
        ("a.txt.zst", b"not compressed", ["cannot be read: ZSTD"]),
        ("a.parquet", b"not parquet", ["is not a parquet file"]),
    ],
)
def test_what_cannot_be_read_is_named_in_its_place(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    found = read(write(tmp_path / name, content))
    assert len(found) == len(expected)
    for item, said in zip(found, expected, strict=True):
        is_named = item.startswith(f"[{tmp_path / name} ") and re.search(said, item)
        assert item == said or is_named, item


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "missing.txt")
    assert "a link to a missing one" in read(tmp_path / "link.txt")[0]
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt is not a file" in read(tmp_path / "pipe.txt")[0]


def test_a_missing_package_is_an_error_and_not_a_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.txt.zst", "a.parquet"):
        with pytest.raises(ValueError, match=rf"reading .*{name} needs pyarrow: pip install"):
            read(write(tmp_path / name, b"x"))
