"""SIGKILL at random instants: of trainings, each followed by a resume, and of other writers.

``python -m tests.stress.kills`` kills trainings of two ranks: see ``killed_ranks``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openmythos.checkpoint.save import save_pretrained
from openmythos.config import SwiGLUConfig
from openmythos.data.index import INDEX_FILE, read_index
from tests.strategies import random_model, small_config
from tests.stress.examples import (
    KINDS,
    Reference,
    Row,
    checkpoints,
    clock,
    facts,
    last_step,
    seeded,
    tree,
)
from tests.stress.process import KILLED, Process, run
from tests.train.examples import write_text

LARGE = 32  # size of what is written
KILLS_PER_RUN = 5  # in the mean, until a run has come to its end
EVERY_FRESH = 5  # every so many-th process is a new interpreter


def of_training(count: int, room: Path, say: Callable[[str], None]) -> Row:
    """Kill trainings at random instants of their lives, from the first byte that they write on."""
    row, done = Row("training killed and resumed"), 0
    is_quick = count < len(KINDS) * KILLS_PER_RUN
    kinds = (KINDS[0], KINDS[-1]) if is_quick else KINDS
    for number, kind in enumerate(kinds):
        wanted = count * (number + 1) // len(kinds)
        reference = Reference(kind, room / kind.replace(" ", "-"), 12 if is_quick else 24)
        runs = 0
        while done < wanted:
            out = reference.room / f"killed-{runs}"
            done = _one_run(row, reference, out, done, wanted, say)
            runs += 1
        row.note("runs", runs)
    return row


def _one_run(
    row: Row, reference: Reference, out: Path, done: int, wanted: int, say: Callable[[str], None]
) -> int:
    """Kill one run again and again, then let it end and compare; returns the kills so far."""
    mean = reference.seconds / KILLS_PER_RUN
    while done < wanted:
        rng, fresh = seeded(f"training {done}"), done % EVERY_FRESH == EVERY_FRESH - 1
        before, is_first = max(checkpoints(out), default=None), not out.exists()
        process = Process(reference.command(out), reference.log, fresh=fresh)
        process.wait_for(lambda: process.holds(out))  # noqa: B023 (called at once)
        # A run's first kill comes while its data is prepared or in its first steps.
        time.sleep(rng.uniform(0, mean / 2 if is_first else 3 * mean))
        if process.kill().status != KILLED:
            break  # it came to its end
        done += 1
        row.count += 1
        check_killed(row, reference, out, before, f"kill {done} of {reference.kind}")
        say(f"killed {done} of {wanted}, in step {last_step(out)}")
    reference.finish(row, out, f"the end of {reference.kind} after {done} kills")
    if hidden := [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]:
        row.fail(f"{reference.kind}: left behind {hidden}")
    return done


def check_killed(row: Row, reference: Reference, out: Path, before: Path | None, what: str) -> None:
    """The newest checkpoint is whole, is the undisturbed run's, and one step old at most."""
    newest = max(checkpoints(out), default=None)
    row.note("inside a save", any((out / "checkpoints").glob(".step-*.tmp")))
    row.note("before the first save", newest is None)
    step = 0 if newest is None else int(newest.name.removeprefix("step-"))
    if last_step(out) - step > 1 or (before is not None and newest is not None and newest < before):
        row.fail(f"{what}: step {last_step(out)} was done, {newest} is the newest", lost=True)
    for checkpoint in checkpoints(out):
        if facts(checkpoint) != reference.facts[checkpoint.name]:
            row.fail(f"{what}: {checkpoint.name} differs: {facts(checkpoint)['damage']}")


# --- other writers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """A command that writes a folder.

    Args:
        name: Its name.
        command: Its arguments before ``--out``.
        before: Arguments of the command that wrote the folder before.
    """

    name: str
    command: list[object]
    before: list[object]

    def seen(self, out: Path) -> dict[str, str]:
        """The files that a reader of the folder sees."""
        if self.name != "prepare":
            return tree(out)
        if not (out / INDEX_FILE).exists():
            return {}
        content = Path(read_index(out).tokenizer_file).parts[0]
        return {k: v for k, v in tree(out).items() if k.startswith((INDEX_FILE, content))}


def writers(room: Path, size: int) -> list[Writer]:
    """``prepare``, ``convert`` and ``export`` of what takes a while to write.

    Args:
        room: Folder for what they read.
        size: 1 for the smallest text and weights.
    """

    def make() -> None:
        config = small_config(
            vocab_size=300, d_model=128, feed_forward=SwiGLUConfig(d_ff=size * 256)
        )
        for seed in (0, 1):
            save_pretrained(random_model(config, seed=seed), room / f"model-{seed}")
        write_text(room, size * 100)

    room.mkdir(parents=True)
    made = run(make, room / "log.txt")
    assert made.status == 0, made.said
    text, new, old = room / "text.txt", room / "model-1", room / "model-0"
    return [
        Writer("prepare", ["prepare", text, "--vocab-size", 400], ["prepare", text, "--bytes"]),
        Writer("convert", ["convert", new], ["convert", old]),
        Writer("export", ["export", new], ["export", old]),
    ]


def of_writers(count: int, room: Path, say: Callable[[str], None]) -> list[Row]:
    """Kill each writer at random instants of its writing, over nothing and over older content."""
    rows = []
    for writer in writers(room, 1 if count == 1 else LARGE):
        row = Row(f"{writer.name} killed and repeated")
        rows.append(row)
        parts, whole, seconds = {}, {}, 0.0
        for which, command in (("old", writer.before), ("new", writer.command)):
            out = room / f"{writer.name}-{which}" / "out"
            out.parent.mkdir()
            process = Process([*command, "--out", out], room / "log.txt")
            process.wait_for(lambda: is_writing(out))  # noqa: B023 (called at once)
            with clock() as passed:
                ended = process.wait()
            assert ended.status == 0, ended.said
            seconds, parts[which], whole = passed(), writer.seen(out), tree(out)
        number = -1
        while row.count < count and number < 5 * count:  # some end before they are killed
            number += 1
            out = room / f"{writer.name}-{number}" / "out"
            out.parent.mkdir()
            old = {}
            if number % 2:
                run([*writer.before, "--out", out], room / "log.txt")
                old = parts["old"]
            process = Process([*writer.command, "--out", out], room / "log.txt")
            process.wait_for(lambda: is_writing(out))  # noqa: B023 (called at once)
            time.sleep(seeded(f"{writer.name} {number}").uniform(0, seconds))
            killed = process.kill().status == KILLED
            row.count += killed
            row.note("while it wrote", killed and is_writing(out))
            found = writer.seen(out)
            row.note("left the new one", killed and found == parts["new"])
            if found not in (old, parts["new"]):
                row.fail(f"kill {number} of {writer.name}: neither the old nor the new is there")
            ended = run([*writer.command, "--out", out], room / "log.txt")
            if ended.status != 0:
                row.fail(f"{writer.name} after kill {number}: {ended.said[-500:]}", lost=True)
            elif tree(out) != whole or len(list(out.parent.iterdir())) != 1:
                row.fail(f"{writer.name} after kill {number}: other files than without the kill")
            say(f"{writer.name} killed {row.count} of {count}")
    return rows


def is_writing(out: Path) -> bool:
    """Whether there is something unfinished beside or in a folder."""
    return any(out.parent.glob(".out.tmp")) or any(out.glob(".building-*"))


if __name__ == "__main__":
    import sys

    from tests.stress.killed_ranks import main

    sys.exit(main())
