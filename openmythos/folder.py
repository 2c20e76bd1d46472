"""Files and folders that appear whole or not at all: a kill at any instant loses nothing.

Every other module that writes goes through here. What is being written stands beside its place as
``.NAME.tmp`` and is renamed into it; two processes must not write the same file or folder at once.
"""

import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

PathLike = str | os.PathLike[str]
MAX_LISTED = 30  # names that one error message lists of a kind


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes into; when the block ends well it takes the place of ``path``.

    Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    os.replace(aside, path)


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file that appears whole or not at all; text becomes UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, data: object) -> None:
    """Write readable JSON that appears whole or not at all."""
    write_whole(path, json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def replaced_folder(folder: PathLike, own_files: Collection[str]) -> Iterator[Path]:
    """An empty folder to write into; when the block ends well it takes the place of ``folder``.

    Until then ``folder`` is untouched. What a killed writer leaves beside it is removed by the next
    one.

    Raises:
        ValueError: ``folder`` holds other files than ``own_files``, those of a checkpoint.
    """
    target = Path(os.path.realpath(folder))
    _refuse_foreign(target, own_files)
    fresh, old = _aside(target), old_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir()
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        # Readers fall back to the old name between the two renames.
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
    """Where a folder stands between the two renames of a replacement."""
    return target.with_name(f".{target.name}.old")


def _aside(target: Path) -> Path:
    """Where a file or folder stands until it is whole."""
    return target.with_name(f".{target.name}.tmp")


def remove_unfinished(folder: Path) -> None:
    """Remove the folders inside ``folder`` that killed writers left half done."""
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished)


def put_in_place(source: Path, target: Path) -> None:
    """Rename a file or folder that is whole; a file that is there is replaced."""
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
    """Swap two folders in one step; False where the system or the file system cannot."""
    swap = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        return libc.renamex_np(*names, swap) == 0
    here = -100  # AT_FDCWD
    return hasattr(libc, "renameat2") and libc.renameat2(here, names[0], here, names[1], swap) == 0


def listed(names: list[str]) -> str:
    """The names, or the first of very many."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
