"""Documents to train on: files, folders, Hugging Face datasets, two built-in corpora.

`load_documents` yields documents one at a time in a fixed order. It never runs code that it reads:
the standard library's modules are parsed, not imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON_DOCS = "python-docs"
PYTHON_SOURCE = "python-source"
BUILTIN_SOURCES = (PYTHON_DOCS, PYTHON_SOURCE)
HF_PREFIX = "hf:"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")

# Raise it when the code below changes a built-in corpus: prepared data is then made again.
CORPUS_VERSION = 1

_SHINGLE_WORDS = 6
_MAX_SEEN_FRACTION = 0.2
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "node_modules"}
_STDLIB_SKIPPED_FOLDERS = {
    *{"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"},
    *{
        "pydoc_data",
        "encodings",
    },  # generated: prose that is read separately, and 120 tables of characters
}


@dataclass(frozen=True, slots=True)
class Document:
    """One text: the unit of the train/validation split and of the document mask."""

    name: str
    text: str


def load_documents(source: str, column: str = "text") -> Iterator[Document]:
    """Documents of `source`, in an order that depends on the source only.

    Args:
        source: A file (.txt .md .rst .py: one document; .jsonl .parquet: one document per row), a
            folder (every such file below it, hidden folders and site-packages skipped), `hf:NAME`
            or `hf:NAME:CONFIG` (the train split of a Hugging Face dataset, streamed), `python-docs`
            (the language reference and the docstrings of this Python's standard library, about 2.1
            MB of English in which no paragraph occurs twice) or `python-source` (the standard
            library's code, about 10 MB).
        column: Name of the text column of .jsonl, .parquet and Hugging Face rows.

    Raises:
        ValueError: The source is unknown, empty or not UTF-8, the column is missing, or a package
            that the source needs is not installed. Errors within a file are raised when it is
            read.
    """
    if source == PYTHON_DOCS:
        return _python_docs()
    if source == PYTHON_SOURCE:
        return _python_source()
    if source.startswith(HF_PREFIX):
        return _from_hugging_face(source, column)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, column)
    if path.is_file():
        if path.suffix.lower() not in TEXT_SUFFIXES + TABLE_SUFFIXES:
            raise ValueError(
                f"cannot read {path}: files end in {' '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}; "
                f"rename or convert it"
            )
        return _not_empty(
            _from_file(path, path.name, column), f"{path} is empty: give a file with text"
        )
    raise ValueError(
        f"unknown source {source!r}: no such file or folder; give a path, 'hf:NAME', "
        f"'hf:NAME:CONFIG', "
        f"'{PYTHON_DOCS}' or '{PYTHON_SOURCE}'"
    )


def source_version(source: str) -> str:
    """A short text that changes when the documents of `source` change; it does not read them.

    Files and folders: a digest of names, sizes and modification times. Built-in corpora: the Python
    version. Hugging Face datasets: the name alone, because a remote change cannot be seen without a
    connection.
    """
    if source in BUILTIN_SOURCES:
        return f"python-{sys.version.split()[0]}-corpus-{CORPUS_VERSION}"
    if source.startswith(HF_PREFIX):
        return source
    path = Path(source)
    digest = hashlib.sha256()
    for file in _folder_files(path) if path.is_dir() else [path]:
        status = file.stat()
        digest.update(
            f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(
                errors="replace"
            )
        )
    return f"files-{digest.hexdigest()[:16]}"


def _not_empty(documents: Iterable[Document], message: str) -> Iterator[Document]:
    found = False
    for document in documents:
        if document.text:
            found = True
            yield document
    if not found:
        raise ValueError(message)


def _folder_files(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in _SKIPPED_FOLDERS]
        for name in names:
            known = Path(name).suffix.lower() in TEXT_SUFFIXES + TABLE_SUFFIXES
            if known and not name.startswith("."):
                files.append(Path(parent) / name)
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _from_folder(folder: Path, column: str) -> Iterator[Document]:
    files = _folder_files(folder)
    suffixes = " ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
    if not files:
        raise ValueError(f"no files to read in {folder}: it and its folders hold no {suffixes}")
    # Empty files (a package's __init__.py) are normal in a folder; it is an error only if all are
    # empty.
    rows = (
        row
        for file in files
        for row in _from_file(file, file.relative_to(folder).as_posix(), column)
    )
    return _not_empty(
        rows, f"all {len(files)} files in {folder} are empty: give a folder with text"
    )


def _from_file(path: Path, name: str, column: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _from_jsonl(path, name, column)
    elif suffix == ".parquet":
        yield from _from_parquet(path, name, column)
    else:
        yield Document(name, _decode(path.read_bytes(), path, 0))


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start}; convert it, "
            f"for example with iconv -t UTF-8"
        ) from None


def _from_jsonl(path: Path, name: str, column: str) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(_decode(line, path, offset))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path} line {number} is not JSON: {error.msg} at column {error.colno}"
                    ) from None
                yield Document(f"{name}:{number}", _cell(row, column, f"{path} line {number}"))
            offset += len(line)


def _from_parquet(path: Path, name: str, column: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError(
            f"reading {path} needs pyarrow: pip install pyarrow, or convert it to .jsonl"
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    with file:
        if column not in file.schema_arrow.names:
            raise ValueError(_missing_column(str(path), column, file.schema_arrow.names))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for row in batch.to_pylist():
                number += 1
                yield Document(f"{name}:{number}", _cell(row, column, f"{path} row {number}"))


def _cell(row: Any, column: str, place: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(
            f"{place} is a {type(row).__name__}, not an object with a {column!r} column"
        )
    if column not in row:
        raise ValueError(_missing_column(place, column, row))
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(
            f"{place} column {column!r} holds a {type(text).__name__}, not text: "
            f"choose another column"
        )
    return text


def _missing_column(place: str, column: str, columns: Iterable[str]) -> str:
    names = ", ".join(columns) or "none"
    return f"{place} has no column {column!r}; its columns are: {names}: choose one with column="


def _from_hugging_face(source: str, column: str) -> Iterator[Document]:
    name, _, config = source.removeprefix(HF_PREFIX).partition(":")
    if not name:
        raise ValueError(f"source {source!r} names no dataset: write hf:NAME or hf:NAME:CONFIG")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"source {source!r} needs the datasets package: pip install datasets"
        ) from None
    return _not_empty(
        _hugging_face_rows(datasets, source, name, config, column), f"{source} has no text"
    )


def _hugging_face_rows(
    datasets: Any, source: str, name: str, config: str, column: str
) -> Iterator[Document]:
    # No shuffle buffer here: `prepare` shuffles all documents.
    try:
        rows = datasets.load_dataset(name, name=config or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            yield Document(f"{source}:{number}", _cell(row, column, source))
    except ValueError:
        raise
    except (
        Exception
    ) as error:  # network, hub and format errors have no common class across versions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot stream {source}: {reason[:200]}; check the name and the connection "
            f"(HF_HUB_OFFLINE must not "
            f"be set), or use a local file or '{PYTHON_DOCS}'"
        ) from None


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [
            f for f in folders if f not in _STDLIB_SKIPPED_FOLDERS and not f.startswith("config-")
        ]
        # _sysconfigdata_* is generated and differs between machines.
        found += [
            Path(parent) / n
            for n in names
            if n.endswith(".py") and not n.startswith("_sysconfigdata")
        ]
    if not found:
        raise ValueError(
            f"no Python source in {root}: this Python has no readable standard library, give a path"
        )
    return sorted((file.relative_to(root).as_posix(), file) for file in found)


def _python_source() -> Iterator[Document]:
    for name, path in _stdlib_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if text.strip():
            yield Document(name, text)


def _python_docs() -> Iterator[Document]:
    documents = [*_pydoc_topics(), *_stdlib_docstrings()]
    # Help topics quote each other and modules copy docstrings. Longer documents come first, and
    # each keeps only the paragraphs that none before it has: a document that contains another one
    # stays complete, and the other one is dropped.
    documents.sort(key=lambda item: (-sum(map(len, item[1])), item[0]))
    seen: set[bytes] = set()
    for name, sections in documents:
        kept = [part for section in sections if (part := _new_paragraphs(section, seen))]
        if kept:
            yield Document(name, "\n\n".join(kept) + "\n")


def _new_paragraphs(section: str, seen: set[bytes]) -> str:
    """The heading of a section and those of its paragraphs that are not in `seen`, which grows."""
    heading, _, body = section.partition("\n\n")
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", body):
        words = re.findall(r"\w+", paragraph.lower())
        if not words:
            continue
        last = max(1, len(words) - _SHINGLE_WORDS + 1)
        # Bytes, not Python's hash(), which differs between processes: a collision would change the
        # corpus.
        runs = [" ".join(words[i : i + _SHINGLE_WORDS]).encode() for i in range(last)]
        shingles = [hashlib.blake2b(run, digest_size=8).digest() for run in runs]
        num_seen = sum(shingle in seen for shingle in shingles)
        if num_seen <= _MAX_SEEN_FRACTION * len(shingles):
            kept.append(paragraph.strip("\n"))
            seen.update(shingles)
    return "\n\n".join([heading, *kept]) if kept else ""


def _pydoc_topics() -> Iterator[tuple[str, list[str]]]:
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise ValueError(
            f"this Python has no language reference at {path}: use '{PYTHON_SOURCE}' or give a path"
        )
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic:{name}", [text]


def _stdlib_docstrings() -> Iterator[tuple[str, list[str]]]:
    for name, path in _stdlib_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old code
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # a template or a deliberately broken example
                continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        sections = [f"{title}\n\n{docstring}" for title, docstring in _docstrings(tree, module)]
        if sections:
            yield module, sections


def _docstrings(node: ast.AST, title: str) -> Iterator[tuple[str, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
        yield title, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{title}.{child.name}")
        elif isinstance(
            child, ast.If | ast.Try | ast.With
        ):  # definitions under a version or import test
            yield from _docstrings(child, title)
