"""Documents of one file: text, or rows of a table, compressed or not.

What cannot be read is not raised but given in its place, so that the reader of many files can
choose to go on.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmythos.config.schema import in_words
from openmythos.data.conversation import COLUMNS, conversation

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet", ".json", ".csv", ".tsv")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
ALL_SUFFIXES = " ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)

# Marks at the start of a text that is not UTF-8. That of UTF-16 is the beginning of one of UTF-32.
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises
PARQUET_ROWS, _PARQUET_BUFFER = 64, 2**20  # rows and bytes that are read at once
_UNREADABLE_JSON = "cannot be read as JSON"


@dataclass(frozen=True, slots=True)
class Document:
    """One text: the unit of the train/validation split and of the document mask."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row, a file or files that are not read, and why.

    `is_bad` is False where this is no fault: nobody asked for them to be read.
    """

    reason: str
    is_bad: bool = True


def file_kind(path: Path) -> str | None:
    """The ending that says how to read a file, without that of its compression; None: unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSED_SUFFIXES
    kind = suffixes[-2] if is_compressed and len(suffixes) > 1 else (suffixes or [""])[-1]
    known = kind in TEXT_SUFFIXES + TABLE_SUFFIXES
    return kind if known and not (is_compressed and kind == ".parquet") else None


def read_file(path: Path, name: str, column: str | None) -> Iterator[Document | LeftOut]:
    """The documents of a file of a known kind, and what of it cannot be read, in order.

    Args:
        path: The file.
        name: What its documents are called; rows of tables are numbered.
        column: The column of tables that holds the text; None: a row is a conversation.

    Raises:
        ValueError: A package that the file needs is not installed.
    """
    kind = file_kind(path)
    try:
        if not path.is_file():
            yield LeftOut(f"{path} is not a file, or a link to a missing one")
        elif kind == ".parquet":
            yield from _parquet_rows(path, name, column)
        else:
            with _opened(path) as stream:
                if kind == ".jsonl":
                    yield from _json_lines(stream, path, name, column)
                elif kind == ".json":
                    yield from _json_rows(stream, path, name, column)
                elif kind in (".csv", ".tsv"):
                    delimiter = "," if kind == ".csv" else "\t"
                    yield from _csv_rows(stream, path, name, column, delimiter)
                elif column is None:
                    yield LeftOut(f"{path} is a text and no table of conversations")
                else:
                    yield Document(name, decode(stream.read(), str(path)))
    except ModuleNotFoundError:
        raise ValueError(
            f"reading {path} needs pyarrow: pip install pyarrow, or convert it to .jsonl"
        ) from None
    except ValueError as error:
        yield LeftOut(str(error))
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["damaged"])[0]
        yield LeftOut(f"{path} cannot be read: {reason}")


def decode(data: bytes, place: str) -> str:
    """The text of bytes in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; without the mark.

    Raises:
        ValueError: It is none of these; the message begins with `place`.
    """
    if (wide := _decode_wide(data, place)) is not None:
        return wide
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    return _decode(data[len(mark) :], place, len(mark))


def cell(row: Any, column: str, place: str) -> str:
    """The text in a column of a row; empty if there is none.

    Raises:
        ValueError: The row has no such column, or it holds something else; the message begins with
            `place`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {in_words(row)}, not an object with a {column!r} column")
    if column not in row:
        raise ValueError(missing_column(place, column, row))
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(
            f"{place} column {column!r} holds {in_words(text)}, not text: choose one with --column"
        )
    return text.removeprefix("\ufeff")  # a byte order mark that somebody took for text


def missing_column(place: str, column: str, columns: Iterable[Any]) -> str:
    """What is said of a table that has other columns."""
    names = ", ".join(map(str, columns)) or "none"
    return f"{place} has no column {column!r}; its columns are: {names}: choose one with --column"


def _opened(path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        frames: io.RawIOBase = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(frames)
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".bz2":
        return bz2.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    return path.open("rb")


def _decode_wide(data: bytes, place: str) -> str | None:
    for mark, encoding in _WIDE_MARKS.items():
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{place} begins with the mark of {encoding.upper()} but is not: "
                    f"{error.reason} at offset {error.start}"
                ) from None
    return None


def _decode(data: bytes, place: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start}; convert it, for example with iconv -t UTF-8"
        ) from None


def _lines(stream: io.BufferedIOBase, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and UTF-8 bytes of each line, without a byte order mark."""
    first, offset = stream.readline(), 0
    if first.startswith(tuple(_WIDE_MARKS)):
        stream = io.BytesIO((_decode_wide(first + stream.read(), str(path)) or "").encode())
        first = stream.readline()
    elif first.startswith(codecs.BOM_UTF8):
        offset = len(codecs.BOM_UTF8)
        first = first[offset:]
    lines = itertools.chain([first] if first else [], stream)
    for number, line in enumerate(lines, start=1):
        yield number, offset, line
        offset += len(line)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 100,000 brackets
        raise ValueError(f"{place} {_UNREADABLE_JSON}: {error}") from None


def _row(row: Any, name: str, number: int, column: str | None, place: str) -> Document | LeftOut:
    try:
        text = conversation(row, place) if column is None else cell(row, column, place)
        return Document(f"{name}:{number}", text)
    except ValueError as error:
        return LeftOut(str(error))


def _json_lines(
    stream: io.BufferedIOBase, path: Path, name: str, column: str | None
) -> Iterator[Document | LeftOut]:
    for number, offset, line in _lines(stream, path):
        if line.strip():
            place = f"{path} line {number}"
            try:
                row = _json(_decode(line, str(path), offset), place)
            except ValueError as error:
                yield LeftOut(str(error))
            else:
                yield _row(row, name, number, column, place)


def _json_rows(
    stream: io.BufferedIOBase, path: Path, name: str, column: str | None
) -> Iterator[Document | LeftOut]:
    """A list of objects, or one object; many files of this name hold one object per line."""
    text = decode(stream.read(), str(path))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(io.BytesIO(text.encode()), path, name, column)
            return
        place = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{path} is not JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {_UNREADABLE_JSON}: {error}") from None
    rows = value if isinstance(value, list) else [value]
    if column and rows and not any(isinstance(row, dict) and column in row for row in rows):
        cell(rows[0], column, str(path))
    for number, row in enumerate(rows, start=1):
        yield _row(row, name, number, column, f"{path} row {number}")


def _csv_rows(
    stream: io.BufferedIOBase, path: Path, name: str, column: str | None, delimiter: str
) -> Iterator[Document | LeftOut]:
    lines = (_decode(line, str(path), offset) for _, offset, line in _lines(stream, path))
    # Strict: otherwise a quote that is never closed swallows the rest of the file.
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # a setting of the process; texts are long
    try:
        columns = reader.fieldnames
        if columns is not None and column is not None and column not in columns:
            raise ValueError(missing_column(str(path), column, columns))
        for number, row in enumerate(reader, start=1):
            if None in row:
                more = "has more fields than the first: a text with separators needs quotes"
                yield LeftOut(f"{path} row {number} {more}")
            else:
                yield _row(row, name, number, column, f"{path} row {number}")
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV after line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, name: str, column: str | None) -> Iterator[Document | LeftOut]:
    """The rows of one column, read a little at a time: row groups may be larger than memory."""
    from pyarrow import ArrowException, parquet

    # By default whole row groups are read ahead.
    reading = {"pre_buffer": False, "buffer_size": _PARQUET_BUFFER}
    try:
        with parquet.ParquetFile(path, **reading) as file:
            names = file.schema_arrow.names
            if column is not None and column not in names:
                raise ValueError(missing_column(str(path), column, names))
            read = [column] if column is not None else [name for name in COLUMNS if name in names]
            if not read:
                conversation(dict.fromkeys(names), str(path))  # says which columns there are
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(row, name, number, column, f"{path} row {number}")
    except ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
