"""The index of prepared data: which files there are, which tokenizer made them, their checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from openmythos.folder import replaced_folder
from openmythos.tokenizer import Tokenizer

FORMAT = "openmythos-tokens"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
SPLITS = ("train", "val")
CHECKSUM = "sha256"  # the field of an index for that of all others; older indices have none
_MAX_REASONS_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file of a split; its path is relative to the prepared folder.

    `num_items` counts tokens in a shard, and offsets in the file of document offsets.
    """

    file: str
    num_items: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """The contents of one split.

    `num_bytes` is the size of its text in UTF-8; `num_tokens` includes bos and eos. Conversations
    have a file of `counted` for each shard: a byte per token, 1 if it counts in the loss. They are
    empty for text, where every token counts.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    shards: tuple[DataFile, ...]
    document_offsets: DataFile
    counted: tuple[DataFile, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A prepared folder, as its `index.json` describes it.

    `tokenizer_sha256` has the SHA-256 of each file of the tokenizer, by its name; data of older
    versions has none. `num_duplicates` counts documents left out because their text occurred
    before, `num_replaced` the characters without a UTF-8 form that became question marks,
    `num_left_out` the rows, files and groups of files that were not read; `left_out` says why for
    the first of them. `reused` is True if `prepare` found the folder up to date and wrote nothing.
    """

    folder: Path
    settings: dict[str, Any]
    dtype: str
    vocab_size: int
    tokenizer_file: str
    tokenizer_fingerprint: str
    num_duplicates: int
    splits: dict[str, SplitIndex]
    tokenizer_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    num_replaced: int = 0
    num_left_out: int = 0
    left_out: list[str] = dataclasses.field(default_factory=list)
    reused: bool = False

    def summary(self) -> str:
        """One line about what the data holds of its source, and what it does not."""
        num_documents = sum(split.num_documents for split in self.splits.values())
        parts = [f"{num_documents:,} documents", f"{self.num_duplicates:,} duplicates dropped"]
        parts.append(f"{self.num_replaced:,} characters replaced")
        reasons = self.left_out[:_MAX_REASONS_SHOWN]
        more = self.num_left_out - len(reasons)
        said = ": " + "; ".join(reasons) + (f"; and {more:,} more" if more else "")
        parts.append(f"{self.num_left_out:,} left out" + (said if reasons else ""))
        return ", ".join(parts)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            ValueError: A file is missing or is not the one described in `index.json`.
        """
        file = self.folder / self.tokenizer_file
        for name, digest in self.tokenizer_sha256.items():
            path = file.with_name(name)
            if not path.is_file() or file_sha256(path) != digest:
                problem = "does not match its SHA-256" if path.is_file() else "is missing"
                raise ValueError(f"damaged data: {path} {problem}; prepare the data again")
        tokenizer = Tokenizer.load(file)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"tokenizer mismatch in {self.folder}: {self.tokenizer_file} is "
                f"{tokenizer.fingerprint[:12]}, the "
                f"tokens were made with {self.tokenizer_fingerprint[:12]}; prepare the data again"
            )
        tokenizer.require_lossless("bits per byte of these tokens")
        return tokenizer

    def link(self, folder: Path) -> bool:
        """Fill ``folder`` with hard links to this data, which outlive the deletion of its folder.

        False, and nothing is written, where the file system has no such links.

        Raises:
            ValueError: ``folder`` holds something else than prepared data.
        """
        content = Path(self.tokenizer_file).parts[0]
        own = {INDEX_FILE, *(path.name for path in folder.glob("data-*"))}
        try:
            with replaced_folder(folder, own) as fresh:
                (fresh / content).mkdir()
                for path in (self.folder / INDEX_FILE, *(self.folder / content).iterdir()):
                    os.link(path, fresh / path.relative_to(self.folder))
        except OSError:
            return False
        return True

    def check_files(self, split: str, *, checksums: bool) -> None:
        """Compare the files of a split with the index: sizes always, SHA-256 if `checksums`.

        Raises:
            ValueError: A file is missing, or its size or content is not the recorded one.
        """
        index = self.splits[split]
        sized = [(file, np.dtype(self.dtype).itemsize) for file in index.shards]
        sized += [(index.document_offsets, 8), *((file, 1) for file in index.counted)]
        for entry, itemsize in sized:
            path = self.folder / entry.file
            size, expected = (
                path.stat().st_size if path.is_file() else None,
                entry.num_items * itemsize,
            )
            problem = None
            if size is None:
                problem = "is missing"
            elif size != expected:
                problem = f"has {size} bytes instead of {expected}"
            elif checksums and file_sha256(path) != entry.sha256:
                problem = "does not match its SHA-256"
            if problem:
                raise ValueError(f"damaged data: {path} {problem}; prepare the data again")


def read_index(folder: str | os.PathLike[str]) -> PreparedData:
    """Read the `index.json` of a prepared folder.

    Raises:
        ValueError: The folder is not prepared data, or has a format version that this code does
            not read.
    """
    path = Path(folder) / INDEX_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} is not prepared data: it has no {INDEX_FILE}; run openmythos prepare first"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if data.pop("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"its format_version is not {FORMAT_VERSION}, the one that this version reads"
            )
        data.pop("format")
        if data.pop(CHECKSUM, None) not in (None, checksum(data)):
            raise ValueError(f"it does not match its own {CHECKSUM}")
        splits = {name: _split_from_json(split) for name, split in data.pop("splits").items()}
        return PreparedData(folder=Path(folder), splits=splits, **data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot use {path}: {error}; prepare the data again in another folder"
        ) from None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that token ids are stored in: little-endian uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def checksum(index: dict[str, Any]) -> str:
    """SHA-256 (hex) of the fields of an index, except those that name format and checksum."""
    left_out = ("format", "format_version", CHECKSUM)
    fields = {name: value for name, value in index.items() if name not in left_out}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_from_json(data: dict[str, Any]) -> SplitIndex:
    files = {
        "shards": tuple(DataFile(**file) for file in data["shards"]),
        "counted": tuple(DataFile(**file) for file in data.get("counted", ())),
        "document_offsets": DataFile(**data["document_offsets"]),
    }
    return SplitIndex(**{**data, **files})
