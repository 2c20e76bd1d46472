"""Atomic writes of files and folders, locks and checksums.

Every other module that writes files goes through here. New content is first written beside its
destination as ``.NAME.tmp`` and then renamed over it: a reader sees the old content or the new,
never a part, and a process killed at any time loses nothing that was there before. Two processes
must not write the same file or folder at once; ``locked`` keeps the second one out.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

PathLike = str | os.PathLike[str]
MAX_LISTED = 30  # the most names in one list of an error message
MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
# Beside the weights of a checkpoint: the settings of the puzzle that it was trained on, and texts
# that it was not trained on. Older versions wrote the settings of walks into a file of their own.
PUZZLE_FILE, WALKS_FILE, HELD_OUT_FILE = "puzzle.json", "walks.json", "held_out.jsonl"
DEPTH_FILE = "depth.json"  # the schedule of depths that a checkpoint was trained with


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to write; when the block ends without an error, it replaces ``path``.

    Missing parent folders are created.

    Raises:
        ValueError: ``path`` is a folder.
        OSError: It cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of a file")
    aside = _aside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def require_writable(path: Path) -> None:
    """Check that a file can be written at ``path``, before the work that makes its content.

    Raises:
        ValueError: ``path`` is a folder.
        OSError: The system refuses.
    """
    with contextlib.suppress(_Tried), whole_file(path):
        raise _Tried


class _Tried(Exception):
    """Ends a trial before anything is replaced."""


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file atomically; text is encoded as UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(path: Path, content: str) -> None:
    """Append text to a file; if the disk is full, none of it.

    Raises:
        OSError: It cannot be written.
    """
    left = content.encode()
    with writing(path), path.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # what is no file cannot be cut
                file.truncate(end)
            raise


def write_json(path: Path, data: object) -> None:
    """Write indented JSON atomically."""
    write_whole(path, json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors, such as that of a full disk, into a sentence about ``path``."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # a sentence already
            raise
        raise OSError(f"{path} cannot be written: {in_a_sentence(error)}") from None


def in_a_sentence(error: Exception) -> str:
    """What an error says; of the system's, without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename is not None:
        return f"{error.filename} is no folder"
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return reason if error.filename is None else f"{reason} ({error.filename})"


@contextlib.contextmanager
def replaced_folder(folder: PathLike, own_files: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an error, it replaces ``folder``.

    Until then ``folder`` is untouched. Leftovers of a killed writer are removed by the next one.

    Raises:
        ValueError: ``folder`` is a file, or holds files whose names are not in ``own_files``.
    """
    target = Path(os.path.realpath(folder))
    _refuse_foreign(target, own_files)
    fresh, old = _aside(target), old_name(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir()
    try:
        with writing(target):
            yield fresh
            for path in (*fresh.rglob("*"), fresh):
                sync(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        # The two folders could not be swapped in one step. Between these two renames, readers find
        # the old folder under ``old_name``.
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
        fresh.rename(target)
    sync(target.parent)
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def _refuse_foreign(target: Path, own_files: Collection[str]) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a checkpoint is a folder")
    if target.is_dir():
        foreign = sorted(path.name for path in target.iterdir() if path.name not in own_files)
        if foreign:
            names = listed(foreign)
            raise ValueError(
                f"{target} holds {names}: replacing the folder would delete that; choose another"
            )


def old_name(target: Path) -> Path:
    """The path of the old folder between the two renames of a replacement."""
    return target.with_name(f".{target.name}.old")


def _aside(target: Path) -> Path:
    """The temporary path of a file or folder that is not complete yet."""
    return target.with_name(f".{target.name}.tmp")


def remove_unfinished(folder: Path) -> None:
    """Remove the incomplete folders that killed writers left inside ``folder``."""
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished)


def remove_folder(folder: Path) -> None:
    """Delete a folder; a process killed meanwhile leaves no part of it under its name."""
    aside = _aside(folder)
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    shutil.rmtree(aside)


def put_in_place(source: Path, target: Path) -> None:
    """Rename a complete file or folder to ``target``; an existing file is replaced."""
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    if os.name == "nt":  # Windows opens no folders; NTFS journals renames
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False if the operating system or file system cannot."""
    swap = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        return libc.renamex_np(*names, swap) == 0
    here = -100  # AT_FDCWD
    return hasattr(libc, "renameat2") and libc.renameat2(here, names[0], here, names[1], swap) == 0


# --- checksums ------------------------------------------------------------------------------------


def file_record(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def write_manifest(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Write the size and the SHA-256 of every file in a folder; call it when all are complete.

    Args:
        folder: The folder.
        known: ``file_record`` of files, by their names; these are not read again.
    """
    records = dict(known or {})
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in records and path.name != MANIFEST_FILE:
            records[name] = file_record(path)
    write_json(folder / MANIFEST_FILE, {"files": dict(sorted(records.items()))})


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What differs from a folder's manifest, in words; None if nothing does or there is none.

    Files that the manifest does not name do not matter.

    Args:
        folder: The folder.
        share: (i, n): of every n files, the SHA-256 of the i-th is compared only, as n processes
            do it together; the sizes of all files are.
    """
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return None
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        recorded = {name: (entry["bytes"], entry["sha256"]) for name, entry in expected.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    for number, (name, (num_bytes, digest)) in enumerate(recorded.items()):
        try:
            status = (folder / name).stat()
            if status.st_size != num_bytes:
                return f"{name} has {status.st_size} bytes instead of {num_bytes}"
            if number % share[1] != share[0]:
                continue
            key = status.st_size, status.st_mtime_ns, status.st_ino
            if _known_sha256(folder / name, key) != digest:
                return f"{name} does not match its SHA-256"
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else str(error)
    return None


@functools.lru_cache(maxsize=4096)
def _known_sha256(path: Path, key: tuple[int, ...]) -> str:
    """The SHA-256 of a file, read once for each ``key``: its size, its time and its inode."""
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- locks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that use this out of ``folder``, which is created if it is missing.

    The lock ends with the process, however that ends. Windows, and file systems without locks, do
    not keep anybody out.

    Raises:
        ValueError: Another process is in; the message names it.
    """
    path = folder / LOCK_FILE
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {platform.node()} since {since}"
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        with writing(path):
            file.truncate()
            file.write(holder.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()  # while it is locked: a lock on a removed file is worth nothing


def holder(folder: Path) -> str | None:
    """The process that has locked a folder, in words; None if no process has."""
    if sys.platform == "win32":
        return None
    import fcntl

    with contextlib.suppress(OSError), (folder / LOCK_FILE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(200).decode(errors="replace") or "another process"
    return None


def _lock(path: Path) -> int:
    """The descriptor of a lock file, which this process has locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ValueError(
                f"{path.parent} is in use by {holder}; wait until it has ended, or choose another "
                "folder"
            ) from None
        except FileNotFoundError:
            pass  # the one before has just removed it
        except OSError:
            return descriptor  # no locks here
        os.close(descriptor)


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or that a checkpoint belongs to; None if it belongs to none."""
    folder = folder.resolve()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    return run if (run / "checkpoints").is_dir() else None


def listed(names: list[str]) -> str:
    """The names separated by commas; past ``MAX_LISTED``, the first ones and how many are left."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
