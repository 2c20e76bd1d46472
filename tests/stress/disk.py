"""A full disk at different points: of trainings, which then go on, and of other writers."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.stress.examples import Reference, Row, checkpoints, facts, tree
from tests.stress.kills import LARGE, Writer, is_writing, writers
from tests.stress.process import Ended, Process

PLENTY = 256 * 2**20
PAGE = 4096


class Disk:
    """A small disk: a tmpfs where one can be mounted, else a limit on the size of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes = path, PLENTY
        path.mkdir()
        self.is_real = self._mount(f"size={PLENTY}")
        self.way = "a small tmpfs" if self.is_real else "RLIMIT_FSIZE, as no tmpfs can be mounted"

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Unmount it."""
        if self.is_real:
            subprocess.run(["umount", str(self.path)], check=True)

    def limit(self, num_bytes: int) -> None:
        """Give it so many bytes, what is on it included."""
        self.num_bytes = num_bytes
        if self.is_real:
            pages = max(1, num_bytes // PAGE)
            assert self._mount(f"remount,size={pages * PAGE}")

    def clear(self) -> None:
        """Delete everything on it, and give it plenty of room."""
        self.limit(PLENTY)
        for path in self.path.iterdir():
            shutil.rmtree(path)

    def used(self) -> int:
        """Bytes in use; of a limit on files, those of the largest file."""
        if self.is_real:
            found = os.statvfs(self.path)
            return (found.f_blocks - found.f_bfree) * found.f_frsize
        sizes = (path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        return max(sizes, default=0)

    def run(self, command: list[object], log: Path) -> Ended:
        """Run a command whose output is on this disk."""
        limit = None if self.is_real or self.num_bytes == PLENTY else self.num_bytes
        return Process(command, log, file_limit=limit).wait()

    def peak(self, command: list[object], log: Path) -> int:
        """The most bytes in use while a command runs."""
        process, most = Process(command, log), 0
        while process.poll() is None:
            try:
                most = max(most, self.used())
            except FileNotFoundError:
                continue  # a file has just been deleted
            time.sleep(0.001)
        ended = process.wait()
        assert ended.status == 0, ended.said
        return most


def full(count: int, room: Path, say: Callable[[str], None]) -> list[Row]:
    """Disks that become full at ``count`` points of each command."""
    room.mkdir(parents=True)
    disk = Disk(room / "disk")
    try:
        rows = [_training(disk, count, room, say)]
        for writer in writers(room / "sources", LARGE) if count > 1 else ():
            rows.append(_writer(disk, writer, count, room, say))
    finally:
        disk.close()
    for row in rows:
        row.note(disk.way, row.count)
    return rows


def _training(disk: Disk, count: int, room: Path, say: Callable[[str], None]) -> Row:
    row = Row("disk full while training, then resumed")
    reference, out = Reference("text", room / "text", 8), disk.path / "run"
    peak = disk.peak(reference.command(out), reference.log)
    for number in range(count):
        disk.clear()
        disk.limit(int(peak * (number + 0.5) / count))
        ended = disk.run(reference.command(out), reference.log)
        what = f"disk of {disk.num_bytes} of {peak} bytes"
        row.count += 1
        if not (ended.refused or ended.status == 0):  # 0: there was room again at the end
            row.fail(f"{what}: status {ended.status}: {ended.said[-500:]}")
        elif str(disk.path) not in "".join(ended.said.splitlines()[-1:]) and ended.status != 0:
            row.fail(f"{what}: no file is named: {ended.said[-500:]}")
        row.note("went on over a full disk", "training goes on" in ended.said)
        for checkpoint in checkpoints(out):
            if facts(checkpoint) != reference.facts[checkpoint.name]:
                row.fail(f"{what}: {checkpoint.name} differs")
        row.note("after the first save", bool(checkpoints(out)))
        disk.limit(PLENTY)
        reference.finish(row, out, what)
        say(f"{number + 1} of {count}, full after {len(checkpoints(out))} saves")
    return row


def _writer(disk: Disk, writer: Writer, count: int, room: Path, say: Callable[[str], None]) -> Row:
    row, log = Row(f"disk full during {writer.name}, then repeated"), room / "log.txt"
    out, command = disk.path / "folder" / "out", [*writer.command, "--out"]
    for number in range(-1, count):
        disk.clear()
        out.parent.mkdir()
        assert disk.run([*writer.before, "--out", out], log).status == 0
        old, before = writer.seen(out), disk.used() if disk.is_real else 0
        if number < 0:
            peak, new, whole = disk.peak([*command, out], log), writer.seen(out), tree(out)
            continue
        disk.limit(before + int((peak - before) * (number + 0.5) / count))
        ended = disk.run([*command, out], log)
        what = f"{writer.name} on a disk of {disk.num_bytes} of {peak} bytes"
        row.count += 1
        if not ended.refused:
            row.fail(f"{what}: status {ended.status}: {ended.said[-500:]}")
        elif str(disk.path) not in ended.said.splitlines()[-1]:
            row.fail(f"{what}: no file is named: {ended.said[-500:]}")
        if writer.seen(out) != old or is_writing(out):
            row.fail(f"{what}: the older content is not as it was", lost=True)
        disk.limit(PLENTY)
        if disk.run([*command, out], log).status != 0 or writer.seen(out) != new:
            row.fail(f"{what}: repeated, it does not write what it should")
        elif tree(out) != whole:
            row.fail(f"{what}: left files behind")
        say(f"{writer.name} {number + 1} of {count}")
    return row
