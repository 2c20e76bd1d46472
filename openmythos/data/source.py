"""Documents to train on: files, folders, standard input, Hugging Face datasets, two corpora.

`read_source` yields documents one at a time in a fixed order. It never runs code that it reads:
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
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from openmythos.data.conversation import COLUMNS, conversation
from openmythos.data.file import (
    ALL_SUFFIXES,
    COMPRESSED_SUFFIXES,
    PARQUET_ROWS,
    Document,
    LeftOut,
    cell,
    decode,
    file_kind,
    missing_column,
    read_file,
)
from openmythos.data.index import FORMAT, INDEX_FILE

PYTHON_DOCS = "python-docs"
PYTHON_SOURCE = "python-source"
BUILTIN_SOURCES = (PYTHON_DOCS, PYTHON_SOURCE)
HF_PREFIX = "hf:"
STANDARD_INPUT = "-"

# Raise it when the code below changes a built-in corpus: prepared data is then made again.
CORPUS_VERSION = 1

_SHINGLE_WORDS = 6
_MAX_SEEN_FRACTION = 0.2
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "node_modules"}
_OFTEN_NO_TEXT = (".json", ".csv", ".tsv")
_STDLIB_SKIPPED_FOLDERS = {
    *{"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"},
    *{
        "pydoc_data",
        "encodings",
    },  # generated: prose that is read separately, and 120 tables of characters
}


def load_documents(source: str, column: str = "text") -> Iterator[Document]:
    """The documents of `read_source`; anything that cannot be read is an error.

    Raises:
        ValueError: As `read_source`, or a file or a row cannot be read.
    """
    return _strict(read_source(source, column))


def _strict(items: Iterable[Document | LeftOut]) -> Iterator[Document]:
    for item in items:
        if isinstance(item, Document):
            yield item
        elif item.is_bad:
            raise ValueError(item.reason)


def read_source(source: str, column: str | None = "text") -> Iterator[Document | LeftOut]:
    """Documents of `source`, and what of it is left out, in an order that depends on it only.

    Args:
        source: A file (.txt .md .rst .py or no ending: one document; .jsonl .json .csv .tsv
            .parquet: one document per row; compressed as .gz .bz2 .xz .zst or not), a folder (every
            such file below it, without hidden folders, site-packages, runs, prepared data and
            checkpoints; its .json, .csv and .tsv files may be something else than text), `-` (one
            text from standard input), `hf:NAME` or `hf:NAME:CONFIG` (the train split of a Hugging
            Face dataset, streamed), `python-docs` (the language reference and the docstrings of
            this Python's standard library, about 2.1 MB of English in which no paragraph occurs
            twice) or `python-source` (the standard library's code, about 10 MB).
        column: Name of the text column of rows; None: every row is a conversation, as
            `conversation` reads it.

    Raises:
        ValueError: The source is unknown or holds no text, or a package that it needs is not
            installed.
    """
    if column is None and source in (*BUILTIN_SOURCES, STANDARD_INPUT):
        raise ValueError(
            f"{source} holds text and no conversations; give a file of rows, such as .jsonl, with "
            "messages, or with prompt and completion"
        )
    if source == PYTHON_DOCS:
        return _python_docs()
    if source == PYTHON_SOURCE:
        return _python_source()
    if source == STANDARD_INPUT:
        return _not_empty(_from_standard_input(), "standard input is empty: give it a text")
    if source.startswith(HF_PREFIX):
        return _from_hugging_face(source, column)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, column)
    if path.is_file():
        is_compressed = path.suffix.lower() in COMPRESSED_SUFFIXES
        has_ending = bool((path.with_suffix("") if is_compressed else path).suffix)
        if file_kind(path) is None and has_ending:  # text8, enwik9 and the like have none
            raise ValueError(
                f"cannot read {path}: files end in {ALL_SUFFIXES}, or compressed in .txt.gz and so "
                f"on ({' '.join(COMPRESSED_SUFFIXES)}, except .parquet); rename or convert it"
            )
        items = read_file(path, path.name, column)
        return _not_empty(items, f"{path} is empty: give a file with text")
    raise ValueError(
        f"unknown source {source!r}: no such file or folder; give a path, '-' for standard input, "
        f"'hf:NAME', 'hf:NAME:CONFIG', '{PYTHON_DOCS}' or '{PYTHON_SOURCE}'"
    )


def source_version(source: str) -> str:
    """A short text that changes when the documents of `source` change; it does not read them.

    Files and folders: a digest of names, sizes and modification times. Built-in corpora: the Python
    version. Standard input and Hugging Face datasets: the name alone, because a change cannot be
    seen.
    """
    if source in BUILTIN_SOURCES:
        return f"python-{sys.version.split()[0]}-corpus-{CORPUS_VERSION}"
    if source.startswith(HF_PREFIX) or source == STANDARD_INPUT:
        return source
    path = Path(source)
    digest = hashlib.sha256()
    for file in _folder_files(path)[0] if path.is_dir() else [path]:
        size, modified = _size_and_time(file)
        digest.update(f"{file.relative_to(path)}\0{size}\0{modified}\n".encode(errors="replace"))
    return f"files-{digest.hexdigest()[:16]}"


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:  # a link to a missing file
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _not_empty(items: Iterable[Document | LeftOut], message: str) -> Iterator[Document | LeftOut]:
    found, first = False, None
    for item in items:
        if isinstance(item, LeftOut):
            first = first or item.reason
            yield item
        elif item.text:
            found = True
            yield item
    if not found:
        raise ValueError(f"{message} (left out: {first})" if first else message)


def _from_standard_input() -> Iterator[Document]:
    yield Document("standard input", decode(sys.stdin.buffer.read(), "standard input"))


def _own_folder(folder: Path) -> str | None:
    """What a folder is if a program like this one wrote it: that is no text to train on."""
    index, config = folder / INDEX_FILE, folder / "config.json"
    if (folder / "checkpoints").is_dir() and (folder / "samples").is_dir():
        return "a run"
    if config.is_file() and any(folder.glob("*.safetensors")):
        return "a checkpoint"
    if index.is_file():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if isinstance(content, dict) and content.get("format") == FORMAT:
            return "prepared data"
    return None


def _folder_files(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """The files to read below a folder, in order, and what else is there."""
    files: list[Path] = []
    left_out: list[LeftOut] = []
    others: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        left_out.append(LeftOut(f"{error.filename} cannot be read: {error.strerror}"))

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(parent)
        kept = [f for f in folders if not f.startswith(".") and f not in _SKIPPED_FOLDERS]
        own = {name: kind for name in kept if (kind := _own_folder(here / name))}
        left_out += [LeftOut(f"{here / n} is {kind}", is_bad=False) for n, kind in own.items()]
        folders[:] = [name for name in kept if name not in own]
        for name in names:
            if file_kind(Path(name)) is not None and not name.startswith("."):
                files.append(here / name)
            elif not name.startswith("."):
                others[Path(name).suffix.lower() or name] += 1
    if others:
        kinds = [suffix for suffix, _ in others.most_common(5)]
        more = " ..." if len(others) > len(kinds) else ""
        reason = f"{others.total()} files of other kinds ({' '.join(kinds)}{more})"
        left_out.append(LeftOut(reason, is_bad=False))
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix()), left_out


def _from_folder(folder: Path, column: str | None) -> Iterator[Document | LeftOut]:
    kind = _own_folder(folder)
    if kind is not None:
        hint = "give it to `train --data`" if kind == "prepared data" else "give a folder of text"
        raise ValueError(f"{folder} is {kind}, not text: {hint}")
    files, left_out = _folder_files(folder)
    # Empty files (a package's __init__.py) are normal in a folder; it is an error only if all are
    # empty.
    message = f"all {len(files)} files in {folder} are empty: give a folder with text"
    if not files:
        message = f"no files to read in {folder}: it and its folders hold no {ALL_SUFFIXES}"
    return _not_empty(_folder_items(folder, files, left_out, column), message)


def _folder_items(
    folder: Path, files: list[Path], left_out: list[LeftOut], column: str | None
) -> Iterator[Document | LeftOut]:
    yield from left_out
    for file in files:
        is_table = file_kind(file) in _OFTEN_NO_TEXT
        for item in read_file(file, file.relative_to(folder).as_posix(), column):
            # Nobody who names a folder says that its package.json is text.
            if isinstance(item, LeftOut) and is_table:
                item = LeftOut(item.reason, is_bad=False)
            yield item


def _from_hugging_face(source: str, column: str | None) -> Iterator[Document | LeftOut]:
    given, at, revision = source.removeprefix(HF_PREFIX), "", ""
    if not Path(given.partition(":")[0]).exists():  # a folder's name may hold an @
        given, at, revision = given.partition("@")
    name, _, config = given.partition(":")
    if not name or (at and not revision):
        what = "revision" if name else "dataset"
        raise ValueError(
            f"source {source!r} names no {what}: write hf:NAME or hf:NAME:CONFIG, and @REVISION "
            "after it for a branch, a tag or a commit"
        )
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"source {source!r} needs the datasets package: pip install datasets"
        ) from None
    return _not_empty(
        _hugging_face_rows(datasets, source, name, config, revision, column),
        f"{source} has no text",
    )


def _hugging_face_rows(
    datasets: Any, source: str, name: str, config: str, revision: str, column: str | None
) -> Iterator[Document | LeftOut]:
    # No shuffle buffer here: `prepare` shuffles all documents.
    try:
        builder = datasets.load_dataset_builder(
            name, name=config or None, revision=revision or None
        )
        rows = builder.as_streaming_dataset("train")
        names = list(rows.features or ())
        if column is not None and names and column not in names:
            yield LeftOut(missing_column(source, column, names))
            return
        if names and hasattr(builder.config, "columns"):  # Parquet
            # No other column, and not by row groups.
            read = [column] if column is not None else [name for name in COLUMNS if name in names]
            builder.config.columns, builder.config.batch_size = read or None, PARQUET_ROWS
            rows = builder.as_streaming_dataset("train")
        for number, row in enumerate(rows):
            place = f"{source} row {number + 1}"
            try:
                text = conversation(row, place) if column is None else cell(row, column, source)
                yield Document(f"{source}:{number}", text)
            except ValueError as error:
                yield LeftOut(str(error))
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
