"""Tokenise documents into shards on disk, once; training then only reads memory-mapped arrays.

A prepared folder holds `index.json` and the data folder named in it:

    index.json                       settings, dtype, tokenizer fingerprint, shards with SHA-256
    data-<digest>/tokenizer.json
    data-<digest>/train-00000.bin    flat token ids, little-endian uint16 (uint32 above 65,536 ids)
    data-<digest>/train-offsets.bin  int64: where each document starts, then the number of tokens
    data-<digest>/val-00000.bin ...

New data becomes visible when `index.json` is replaced, in one step: a process killed at any time
leaves either the old data or the new, complete. Call `prepare` from one process at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped

from openmythos.config.schema import as_seed
from openmythos.data.conversation import Counted, contents, encode_conversation
from openmythos.data.file import Document, LeftOut
from openmythos.data.hashing import hash_bytes, mix, split_keys, threshold
from openmythos.data.index import (
    CHECKSUM,
    FORMAT,
    FORMAT_VERSION,
    INDEX_FILE,
    SPLITS,
    DataFile,
    PreparedData,
    SplitIndex,
    checksum,
    file_sha256,
    read_index,
    token_dtype,
)
from openmythos.data.source import STANDARD_INPUT, read_source, source_version
from openmythos.folder import put_in_place, write_json, write_whole, writing
from openmythos.tokenizer import MIN_BPE_VOCAB, Tokenizer, train_bpe

MAX_BPE_TRAINING_BYTES = 128 * 2**20

_PURPOSE = "training data and bits per byte"
_BATCH_BYTES = 4 * 2**20
_BUILDING_PREFIX = ".building-"
_DATA_FOLDER = re.compile(r"data-[0-9a-f]{12}(-\d+)?")
_NUM_PIECES = 100
_MIN_PIECE_BYTES = 1024
_MAX_REASONS = 100  # that the index keeps

# Where a long document is cut, the best place first: after a blank line, a line, a sentence (the
# three bytes are the full stop of Chinese and Japanese), a word. A line ends with LF, CR or both.
_CUTS = tuple(
    re.compile(pattern)
    for pattern in (
        rb"\n[ \t]*\r?\n|\r[ \t]*\r",
        rb"\n|\r(?!\n)",
        rb"[.!?][\"')\]]*\s|\xe3\x80\x82",
        rb"\s",
    )
)


def prepare(
    source: str,
    out: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 2048,
    val_fraction: float = 0.1,
    seed: int = 0,
    column: str = "text",
    skip_bad: bool = False,
    conversations: Counted | None = None,
    max_shard_tokens: int = 100_000_000,
) -> PreparedData:
    """Tokenise a source into `out`; do nothing if `out` already holds exactly this data, intact.

    A hash of (seed, text) assigns each document to training or validation. So documents that are
    added later do not move others, and of equal documents only one is kept. A source with few
    documents (such as one long text file) is first cut into about a hundred, and so is a document
    longer than the validation split is meant to be: after a blank line if there is one near, else
    after a line, a sentence or a word, else between two characters. Documents are stored in an
    order shuffled by `seed`, each as bos, its tokens, eos.

    A row of conversations is a document that is never cut: its messages in the chat template of the
    tokenizer. Only their answers count in the loss, or everything.

    Args:
        source: What `read_source` accepts.
        out: Folder to write: new, empty, or with prepared data, which is then replaced.
        tokenizer: Tokenizer to use; None trains a byte-level BPE on the training split (its first
            128 MiB).
        vocab_size: Size of the vocabulary to train, special tokens included; unused if `tokenizer`
            is given.
        val_fraction: Expected fraction of documents that are held out, in [0, 1); 0 makes the
            validation split empty.
        seed: Seed of the split and of the order.
        column: Text column of tables and of Hugging Face rows.
        skip_bad: Leave out files and rows that cannot be read, instead of stopping at the first.
        conversations: Which tokens of conversations count, "answers" or "all"; None: rows are text.
        max_shard_tokens: Maximum number of tokens per file.

    Raises:
        ValueError: An argument is out of range, the source cannot be read or split, or `out` holds
            other files.
    """
    _check_arguments(tokenizer, vocab_size, val_fraction, seed, max_shard_tokens)
    if conversations and (tokenizer is None or tokenizer.chat_template is None):
        raise ValueError(
            "conversations need a tokenizer with a chat template: give a checkpoint that has one "
            "(--tokenizer; in training --from)"
        )
    if conversations and column != "text":
        raise ValueError(
            f"a conversation is in messages, in prompt and completion, or in text, and not in the "
            f"column {column!r}: name its columns so, and leave --column out"
        )
    folder = Path(out)
    old = _existing(folder)
    settings: dict[str, Any] = {
        "source": source,
        "source_version": None,
        "column": column,
        "skip_bad": skip_bad,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "vocab_size": None if tokenizer else vocab_size,
        "val_fraction": val_fraction,
        "seed": seed,
        "max_shard_tokens": max_shard_tokens,
    }
    # Before source_version, whose errors are less clear.
    items = read_source(source, None if conversations else column)
    if conversations:  # older data of text has no such setting
        settings["conversations"] = conversations
    if tokenizer is not None:
        items = _checked(items, tokenizer, conversations)
    settings["source_version"] = source_version(source)
    is_known = source != STANDARD_INPUT and old is not None and old.settings == settings
    if old is not None and is_known and _is_intact(old):
        return dataclasses.replace(old, reused=True)

    return _build(folder, items, settings, tokenizer, conversations)


def _build(
    folder: Path,
    items: Iterable[Document | LeftOut],
    settings: dict[str, Any],
    tokenizer: Tokenizer | None,
    conversations: Counted | None,
) -> PreparedData:
    """Write the items as data with these settings, and put it in place."""
    folder.mkdir(parents=True, exist_ok=True)
    building = folder / f"{_BUILDING_PREFIX}{os.getpid()}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        spool = _Spool(building / "spool", items, settings["skip_bad"])
        cut = conversations is None
        is_val = spool.arrange(settings["seed"], settings["val_fraction"], cut=cut)
        if tokenizer is None:
            texts = spool.texts(~is_val, MAX_BPE_TRAINING_BYTES)
            tokenizer = train_bpe(texts, settings["vocab_size"])
        tokenizer.marking_begin().save(building)  # as every document has it from here on
        splits = {
            split: _write_split(
                _token_batches(spool.texts(chosen), tokenizer, conversations),
                tokenizer,
                building,
                split,
                settings["max_shard_tokens"],
            )
            for split, chosen in zip(SPLITS, (~is_val, is_val), strict=True)
        }
        (building / "spool").unlink()
        return _publish(folder, building, settings, tokenizer, spool.counts(), splits)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_arguments(
    tokenizer: Tokenizer | None,
    vocab_size: int,
    val_fraction: float,
    seed: int,
    max_shard_tokens: int,
) -> None:
    if tokenizer is not None:
        tokenizer.require_lossless(_PURPOSE)
    elif vocab_size < MIN_BPE_VOCAB:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {MIN_BPE_VOCAB}, for the 256 bytes "
            "and the special tokens"
        )
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(
            f"val_fraction is {val_fraction}; it must be 0 (no validation) or more, and below 1"
        )
    as_seed("seed", seed)
    if max_shard_tokens < 1:
        raise ValueError(f"max_shard_tokens={max_shard_tokens} is too small: give at least 1")


def _existing(folder: Path) -> PreparedData | None:
    """The data that `folder` holds, if any, after removing what killed builds left.

    Raises:
        ValueError: It holds other files.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to write the prepared data into")
    for stale in folder.glob(f"{_BUILDING_PREFIX}*"):
        if not _is_running(stale.name.removeprefix(_BUILDING_PREFIX)):
            shutil.rmtree(stale, ignore_errors=True)
    if (folder / INDEX_FILE).is_file():
        data = read_index(folder)
        _remove_unused(folder, keep=Path(data.tokenizer_file).parts[0])
        return data
    # A first build that was killed just before it wrote index.json leaves a data folder behind.
    _remove_unused(folder, keep="")
    others = [p.name for p in folder.iterdir() if not p.name.startswith(_BUILDING_PREFIX)]
    if others:
        raise ValueError(
            f"{folder} holds other files ({sorted(others)[0]}, ...) and no {INDEX_FILE}: give a "
            f"new or empty folder"
        )
    return None


def _remove_unused(folder: Path, *, keep: str) -> None:
    for path in folder.iterdir():
        if path.name != keep and _DATA_FOLDER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True


def _is_intact(data: PreparedData) -> bool:
    try:
        data.load_tokenizer()
        for split in SPLITS:
            data.check_files(split, checksums=True)
    except ValueError:
        return False
    return True


class _Spool:
    """All text in one file, so that a corpus larger than memory can be split and shuffled.

    Only three numbers per document stay in memory: its offset, its size and a 64-bit hash of its
    text.

    Raises:
        ValueError: Something cannot be read, and `skip_bad` is not set.
    """

    def __init__(self, path: Path, items: Iterable[Document | LeftOut], skip_bad: bool) -> None:
        self.path = path
        self.num_replaced, self.num_left_out, self.num_duplicates = 0, 0, 0
        self.left_out: list[str] = []
        offsets, sizes, hashes = array("q"), array("q"), array("Q")
        try:
            with path.open("wb") as file:
                for item in items:
                    if isinstance(item, LeftOut):
                        self._leave_out(item, skip_bad)
                    elif item.text:
                        data = self._encode(item.text)
                        offsets.append(file.tell())
                        sizes.append(len(data))
                        hashes.append(hash_bytes(data))
                        file.write(data)
        except OSError as error:
            if error.filename is not None:  # of the source
                raise
            with writing(path):
                raise
        self.offsets = np.array(offsets, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.hashes = np.array(hashes, dtype=np.uint64)

    def _leave_out(self, item: LeftOut, skip_bad: bool) -> None:
        if item.is_bad and not skip_bad:
            raise ValueError(
                f"{item.reason}; or leave out all that cannot be read (--skip-bad; in training, "
                f"--set data.skip_bad=true)"
            )
        self.num_left_out += 1
        if len(self.left_out) < _MAX_REASONS:
            self.left_out.append(item.reason)

    def _encode(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
            data = text.encode("utf-8", errors="replace")
            self.num_replaced += data.count(b"?") - text.count("?")
            return data

    def counts(self) -> dict[str, Any]:
        """What of the source is not in the data, as `PreparedData` has it."""
        names = ("num_duplicates", "num_replaced", "num_left_out", "left_out")
        return {name: getattr(self, name) for name in names}

    def arrange(self, seed: int, val_fraction: float, *, cut: bool) -> Bool[np.ndarray, " N"]:
        """Drop duplicates and shuffle; returns which documents are held out.

        With ``cut``, documents that are too long or too few for that are cut before.
        """
        if val_fraction > 0 and cut:
            is_few = len(self.sizes) < 2 / val_fraction
            self._cut_documents(0 if is_few else int(val_fraction * self.sizes.sum()))
        _, first = np.unique(self.hashes, return_index=True)
        self.num_duplicates = len(self.hashes) - len(first)
        order = first[np.argsort(mix(self.hashes[first], 2 * seed + 1), kind="stable")]
        self.offsets, self.sizes, self.hashes = (
            self.offsets[order],
            self.sizes[order],
            self.hashes[order],
        )
        keys = split_keys(self.hashes, seed)
        is_val = keys < threshold(val_fraction)
        if val_fraction > 0:
            if len(keys) < 2:
                raise ValueError(
                    "the source says one thing only (repetitions left out), which cannot be split "
                    "into train and validation: give more text"
                )
            # Few documents can all hash to the same split; then the one whose key is nearest to the
            # threshold moves to the other.
            if not is_val.any():
                is_val[np.argmin(keys)] = True
            if is_val.all():
                is_val[np.argmax(keys)] = False
        return is_val

    def texts(self, chosen: Bool[np.ndarray, " N"], max_bytes: int | None = None) -> Iterator[str]:
        """Text of the chosen documents in shuffled order, at most about `max_bytes` in all."""
        given = 0
        with self.path.open("rb") as file:
            for i in np.flatnonzero(chosen):
                if max_bytes is not None and given >= max_bytes:
                    return
                file.seek(int(self.offsets[i]))
                yield file.read(int(self.sizes[i])).decode("utf-8")
                given += int(self.sizes[i])

    def _cut_documents(self, max_bytes: int) -> None:
        """Cut the documents of more than `max_bytes`."""
        total = int(self.sizes.sum())
        target = max(1, total // _NUM_PIECES, min(_MIN_PIECE_BYTES, total // 8))
        offsets, sizes, hashes = array("q"), array("q"), array("Q")
        documents = zip(
            self.offsets.tolist(), self.sizes.tolist(), self.hashes.tolist(), strict=True
        )
        with self.path.open("rb") as file:
            for offset, size, whole in documents:
                data = b""
                if size > max_bytes:
                    file.seek(offset)
                    data = file.read(size)
                start = 0
                while start < size:
                    end = _piece_end(data, start, target) if data else size
                    offsets.append(offset + start)
                    sizes.append(end - start)
                    hashes.append(hash_bytes(data[start:end]) if data else whole)
                    start = end
        self.offsets = np.array(offsets, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.hashes = np.array(hashes, dtype=np.uint64)


def _piece_end(data: bytes, start: int, target: int) -> int:
    """Where a piece of at least `target` and less than twice as many bytes ends."""
    first, last = start + target, start + 2 * target
    for cut in _CUTS:
        # From the byte before: a place that ends there is the first that is allowed.
        if found := cut.search(data, first - 1, last):
            return found.end()
    if len(data) <= last:
        return len(data)
    end = first
    while data[end] & 0xC0 == 0x80:  # inside a character
        end += 1
    return end


def _checked(
    items: Iterable[Document | LeftOut], tokenizer: Tokenizer, counted: Counted | None
) -> Iterator[Document | LeftOut]:
    """The items, without those that the tokenizer loses a part of, or its template refuses."""
    for item in items:
        if isinstance(item, Document):
            try:
                said = item.text if counted is None else contents(item.text)
                tokenizer.require_lossless(_PURPOSE, said)
                if counted and not encode_conversation(item.text, tokenizer, counted)[1][1:].any():
                    raise ValueError("no token of it counts: the template marks no answer in it")
            except ValueError as error:
                yield LeftOut(f"{item.name}: {error}")
                continue
        yield item


class _Tokens(NamedTuple):
    """Documents, and which of their tokens count; the latter of conversations only."""

    documents: list[Int[np.ndarray, " T"]]
    counted: list[Bool[np.ndarray, " T"]]


def _token_batches(
    texts: Iterator[str], tokenizer: Tokenizer, counted: Counted | None
) -> Iterator[_Tokens]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= _BATCH_BYTES:
            yield _encode_documents(batch, tokenizer, counted)
            batch, num_characters = [], 0
    if batch:
        yield _encode_documents(batch, tokenizer, counted)


def _encode_documents(texts: list[str], tokenizer: Tokenizer, counted: Counted | None) -> _Tokens:
    if counted is not None:
        pairs = [encode_conversation(text, tokenizer, counted) for text in texts]
        return _Tokens([ids for ids, _ in pairs], [answers for _, answers in pairs])
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    encoded = tokenizer.encode_batch(texts)
    return _Tokens([np.array([begin, *ids, end], dtype=np.int64) for ids in encoded], [])


def _write_split(
    batches: Iterator[_Tokens],
    tokenizer: Tokenizer,
    building: Path,
    split: str,
    max_shard_tokens: int,
) -> SplitIndex:
    shards = _Shards(building, split, token_dtype(tokenizer.vocab_size), max_shard_tokens)
    counted = _Shards(building, f"{split}-counted", np.dtype(np.uint8), max_shard_tokens)
    lengths: list[int] = []
    num_bytes = 0
    for batch in batches:
        lengths += map(len, batch.documents)
        num_bytes += sum(int(tokenizer.token_num_bytes[ids].sum()) for ids in batch.documents)
        shards.add(batch.documents)
        counted.add(batch.counted)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<i8")
    return SplitIndex(
        num_documents=len(lengths),
        num_tokens=int(offsets[-1]),
        num_bytes=num_bytes,
        shards=shards.close(),
        document_offsets=_write_array(building, f"{split}-offsets.bin", offsets),
        counted=counted.close(),
    )


class _Shards:
    """Writes arrays one after the other into files of at most so many items."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype[Any], max_items: int) -> None:
        self.folder, self.stem, self.max_items = folder, stem, max_items
        self.pending = np.empty(0, dtype=dtype)
        self.files: list[DataFile] = []

    def add(self, arrays: Sequence[Shaped[np.ndarray, " N"]]) -> None:
        """Write what fills files; the rest waits."""
        dtype = self.pending.dtype
        self.pending = np.concatenate([self.pending, *(array.astype(dtype) for array in arrays)])
        while len(self.pending) >= self.max_items:
            self._write(self.max_items)

    def close(self) -> tuple[DataFile, ...]:
        """Write the rest; returns all files."""
        if len(self.pending):
            self._write(len(self.pending))
        return tuple(self.files)

    def _write(self, count: int) -> None:
        name = f"{self.stem}-{len(self.files):05d}.bin"
        self.files.append(_write_array(self.folder, name, self.pending[:count]))
        self.pending = self.pending[count:]


def _write_array(folder: Path, name: str, values: Integer[np.ndarray, " N"]) -> DataFile:
    data = np.ascontiguousarray(values).data.cast("B") if len(values) else memoryview(b"")
    write_whole(folder / name, data)
    return DataFile(file=name, num_items=len(values), sha256=hashlib.sha256(data).hexdigest())


def _publish(
    folder: Path,
    building: Path,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    counts: dict[str, Any],
    splits: dict[str, SplitIndex],
) -> PreparedData:
    content = json.dumps(
        [settings, [dataclasses.asdict(split) for split in splits.values()]], sort_keys=True
    )
    stem = f"data-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    name, attempt = stem, 0
    while (folder / name).exists():  # damaged, and still named in the index
        attempt += 1
        name = f"{stem}-{attempt}"
    index: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_file": f"{name}/tokenizer.json",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **counts,
        "splits": {split: _split_to_json(content, name) for split, content in splits.items()},
    }
    index["tokenizer_sha256"] = {p.name: file_sha256(p) for p in sorted(building.glob("*.json"))}
    write_json(building / INDEX_FILE, {**index, CHECKSUM: checksum(index)})
    put_in_place(building, folder / name)
    put_in_place(folder / name / INDEX_FILE, folder / INDEX_FILE)
    _remove_unused(folder, keep=name)
    return read_index(folder)


def _split_to_json(split: SplitIndex, folder_name: str) -> dict[str, Any]:
    data = dataclasses.asdict(split)
    if not data["counted"]:
        del data["counted"]  # as older versions write and read it
    for entry in [*data["shards"], data["document_offsets"], *data.get("counted", ())]:
        entry["file"] = f"{folder_name}/{entry['file']}"
    return data
