"""Kills at random instants, full disks, damaged files, several trainings at once.

    make stress                          or   make stress ARGS="--quick --out results"

What is tried is drawn from fixed seeds; what a kill interrupts depends on the machine as well.
Nothing may be lost or wrong. The table is written to ``results.md``, with ``results.json`` beside
it. Not part of the test suite, which runs ``--quick``: two kills and one of each.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.stress.examples import Row

HERE = Path(__file__).parent
PARTS = ("kills", "writers", "disk", "corruption", "together")
INTRODUCTION = """# Results of `make stress`

Every command runs in a process of its own. *lost*: something that was complete before is gone, or
the command cannot go on. *wrong*: the result differs, bit for bit, from one that nothing disturbed,
without a word; or the program ended in a traceback.

"""


class Progress:
    """One line per case on a terminal; elsewhere at most one every ten seconds."""

    def __init__(self) -> None:
        self.started, self.last, self.part = time.monotonic(), float("-inf"), ""

    def __call__(self, said: str) -> None:
        now = time.monotonic()
        screen = sys.stderr.isatty()
        if screen or now - self.last > 10:
            self.last = now
            text = f"{now - self.started:4.0f} s  {self.part}: {said}"
            print(
                f"\r{text[:100]:100}" if screen else text,
                end="" if screen else "\n",
                file=sys.stderr,
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills of trainings")
    parser.add_argument("--quick", action="store_true", help="two kills and one of each")
    parser.add_argument("--only", choices=PARTS, help="one of the parts")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    arguments = parser.parse_args()
    progress = Progress()
    progress.part = "starting"
    progress("importing the package")
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        rows = measure(arguments, Path(folder), progress)
    seconds = time.monotonic() - progress.started
    print(file=sys.stderr)
    print("\n".join(table(rows)))
    for row in rows:
        for failure in row.failures:
            print(f"\n{failure}")
    if arguments.only is None:
        write(rows, seconds, arguments)
    return 1 if any(row.failures for row in rows) else 0


def measure(arguments: argparse.Namespace, room: Path, progress: Progress) -> "list[Row]":
    """The rows of all parts, in a folder for their files."""
    from tests.stress import corruption, disk, kills, together

    quick = arguments.quick
    num_kills = 2 if quick else arguments.kills
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "kills": lambda path: [kills.of_training(num_kills, path, progress)],
        "writers": lambda path: kills.of_writers(1 if quick else 10, path, progress),
        "disk": lambda path: disk.full(1 if quick else 8, path, progress),
        "corruption": lambda path: corruption.corrupted(path, progress, quick=quick),
        "together": lambda path: together.at_once(1 if quick else 10, path, progress),
    }
    rows: list[Row] = []
    for name in PARTS if arguments.only is None else [arguments.only]:
        progress.part = name
        progress("begins")
        rows += parts[name](room / name)
    return rows


def table(rows: "list[Row]") -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| kind | count | lost | wrong | of these |", "|---|---:|---:|---:|---|"]
    for row in rows:
        notes = ", ".join(f"{number} {name}" for name, number in row.notes.items())
        lines.append(f"| {row.kind} | {row.count} | {row.lost} | {row.wrong} | {notes} |")
    return lines


def write(rows: "list[Row]", seconds: float, arguments: argparse.Namespace) -> None:
    """Write ``results.json`` and ``results.md``."""
    from openmythos.folder import write_json, write_whole

    command = "make stress" + (' ARGS="--quick"' if arguments.quick else "")
    total = {name: sum(getattr(row, name) for row in rows) for name in ("count", "lost", "wrong")}
    said = f"`{command}`: {total['count']} cases in {seconds:.0f} s, "
    said += f"{total['lost']} lost, {total['wrong']} wrong.\n\n"
    write_whole(arguments.out / "results.md", INTRODUCTION + said + "\n".join(table(rows)) + "\n")
    kinds = [
        {"kind": r.kind, "count": r.count, "lost": r.lost, "wrong": r.wrong, "notes": r.notes}
        for r in rows
    ]
    write_json(
        arguments.out / "results.json",
        {"command": command, "seconds": round(seconds), **total, "kinds": kinds},
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
