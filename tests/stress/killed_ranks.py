"""Runs of two ranks, killed at random instants and resumed on one, two or four.

    python -m tests.stress.kills                      or   ... --kills 3 --out results

Every loss must be that of a run that nothing disturbed: bit for bit on two ranks, within 1e-12 on
others, in fp64. Every file of a checkpoint that ranks wrote is cut, and has one bit flipped: none
of them may be used. Unpickling anything is an error in all processes.
"""

import argparse
import contextlib
import os
import pickle
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmythos import cli
from openmythos.checkpoint.load import checkpoint_damage, newest_checkpoint
from openmythos.folder import MANIFEST_FILE
from openmythos.train.optim import OptimizerConfig
from tests.stress.examples import Row, checkpoints, seeded
from tests.stress.process import KILLED, Process, run
from tests.train.examples import measured, text_config, write_config, write_text

WORLDS = (1, 2, 4)  # numbers of ranks that go on
STEPS = 8
FEW = 1e-12  # how far losses of other numbers of ranks may be apart, relative
INSIDE_SAVES = 3  # every so many-th kill


INTRODUCTION = """# Results of `python -m tests.stress.kills`

Runs of two ranks (MoE, a depth per sequence, eight steps in fp64, a checkpoint after each) are
killed at random instants, both ranks or only one; a third of them while a checkpoint is written.
Each is resumed on one, two or four ranks and compared with a run that nothing disturbed: every
logged number, bit for bit on two ranks, within 1e-12 on one and four. *lost*: the run cannot go on.
*wrong*: a number differs, a checkpoint is not whole, or a damaged file is used or not named.
Unpickling is an error in every rank.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, help="file of the table; default: printed only")
    arguments = parser.parse_args()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="kills-") as room:
        rows = measure(arguments.kills, Path(room), say)
    lines = [
        "| what | times | lost | wrong | besides |",
        "|---|---|---|---|---|",
        *(
            f"| {row.kind} | {row.count} | {row.lost} | {row.wrong} | "
            f"{', '.join(f'{name}: {count}' for name, count in row.notes.items())} |"
            for row in rows
        ),
    ]
    print("\n".join(lines))
    for failure in (failure for row in rows for failure in row.failures):
        print(f"\n{failure}")
    if arguments.out is not None:
        arguments.out.write_text(INTRODUCTION + "\n".join(lines) + "\n", encoding="utf-8")
    return 1 if any(row.failures for row in rows) else 0


def measure(count: int, room: Path, say: Callable[[str], None]) -> list[Row]:
    """Kill ``count`` runs of two ranks, then damage what the last one wrote."""
    # Muon's iterations are in fp32, whatever the weights are.
    settings = {"max_steps": STEPS, "optimizer": OptimizerConfig(muon_lr=None)}
    file = write_config(text_config(write_text(room, 60), **settings), room / "config.json")
    group = Group(2, file, room / "whole", room)
    started = time.monotonic()
    assert group.wait() == [0, 0], group.said()
    seconds = time.monotonic() - started
    whole = measured(room / "whole")
    assert len([row for row in whole if row["kind"] == "train"]) == STEPS
    say(f"the undisturbed run took {seconds:.1f} s")
    killed = Row("runs of two ranks killed, then resumed")
    for number in range(count):
        _kill_one(killed, number, file, room, whole, seconds)
        say(f"killed {number + 1} of {count}: {killed.notes}")
        if killed.failures:
            say(killed.failures[-1])
    return [killed, _damaged(room / "whole", room / "damaged")]


def _kill_one(
    row: Row, number: int, file: Path, room: Path, whole: list[dict[str, Any]], seconds: float
) -> None:
    rng, out = seeded(f"ranks {number}"), room / f"killed-{number}"
    inside, world = number % INSIDE_SAVES == 0, rng.choice(WORLDS)
    what = f"kill {number}, resumed on {world}"
    group = Group(2, file, out, room)
    if inside:
        saves = rng.randrange(1, STEPS)
        group.wait_for(lambda: _saves(out, saves))
        time.sleep(rng.uniform(0, 0.01))
    else:
        time.sleep(rng.uniform(0.1, 1) * seconds)
    lone = rng.random() < 0.5  # the other rank then finds its partner gone
    row.note("one rank only", group.kill(only=rng.randrange(2) if lone else None))
    row.note("inside a save", any((out / "checkpoints").glob(".step-*.tmp")))
    row.count += 1
    for checkpoint in checkpoints(out):
        if problem := checkpoint_damage(checkpoint):
            row.fail(f"{what}: {checkpoint.name}: {problem}")
    row.note("before the first save", not checkpoints(out))
    group = Group(world, file, out, room)
    if group.wait() != [0] * world:
        row.fail(f"{what}: {group.said()}", lost=True)
    elif problem := _differs(whole, measured(out), exact=world == 2):
        row.fail(f"{what}: {problem}")
    row.note(f"resumed on {world}")
    if left := [path.name for path in (out / "checkpoints").iterdir() if path.name[0] == "."]:
        row.fail(f"{what}: left behind {left}")
    shutil.rmtree(out)


def _saves(out: Path, saves: int) -> bool:
    """Whether the checkpoint of a step is being written."""
    return (out / "checkpoints" / f".step-{saves:08d}.tmp").exists()


def _differs(whole: list[dict[str, Any]], found: list[dict[str, Any]], exact: bool) -> str | None:
    """What differs between the rows of two runs; the norms and losses may in their last digits."""
    if exact or len(whole) != len(found):
        return None if whole == found else f"{len(found)} rows differ from {len(whole)}"
    for expected, got in zip(whole, found, strict=True):
        for name, value in expected.items():
            other = got.get(name)
            if isinstance(value, float) and isinstance(other, float):
                if abs(other - value) <= FEW * max(1.0, abs(value)):
                    continue
            elif value == other:
                continue
            return f"step {expected['step']}: {name} is {other} instead of {value}"
    return None


def _damaged(run_folder: Path, room: Path) -> Row:
    """Cut every file of the newest checkpoint, flip a bit of each: the one before must be used."""
    row = Row("files of ranks damaged")
    newest = max(checkpoints(run_folder))
    names = sorted(path.name for path in newest.iterdir())
    for name in names:
        for damage in ("cut", "one bit"):
            shutil.copytree(run_folder, room)
            path = room / "checkpoints" / newest.name / name
            content = bytearray(path.read_bytes())
            if damage == "cut":
                content = content[: len(content) // 2]
            else:
                place = seeded(f"bit of {name}").randrange(8 * len(content))
                content[place // 8] ^= 1 << place % 8
            path.write_bytes(content)
            ended = run(lambda: str(newest_checkpoint(room)), room.parent / "log.txt")
            row.count += 1
            if newest.name not in ended.said or "is used instead" not in ended.said:
                row.fail(f"{name}, {damage}: {ended.said}")
            elif name not in ended.said and name != MANIFEST_FILE:  # which speaks of other files
                row.fail(f"{name}, {damage} is not named: {ended.said}")
            shutil.rmtree(room)
    row.note("files", len(names))
    return row


# --- processes ------------------------------------------------------------------------------------


@dataclass
class Group:
    """A run on several ranks: each is a process that was forked from this one.

    Args:
        world: Number of ranks.
        config: The run's configuration.
        out: The run's folder.
        room: Folder of what the ranks say.
    """

    world: int
    config: Path
    out: Path
    room: Path
    processes: list[Process] = field(init=False)

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [self.room / f"rank-{rank}.txt" for rank in range(self.world)]
        self.processes = [
            Process(lambda: self._train(rank, port), log)  # noqa: B023 (forked at once)
            for rank, log in enumerate(self.logs)
        ]

    def _train(self, rank: int, port: int) -> None:
        import torch

        torch.set_default_dtype(torch.float64)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "MASTER_PORT": port}
        if self.world > 1:
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        words = ["train", "--config", self.config, "--out", self.out]
        layout = f"train.parallel.dp_shard={self.world}"
        sys.argv = ["openmythos", *map(str, words), "--set", layout]
        with _nothing_is_unpickled():
            cli.main()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Until something is so, or a rank has ended."""
        while not ready() and all(process.poll() is None for process in self.processes):
            time.sleep(0.0002)

    def kill(self, only: int | None) -> bool:
        """Kill one rank, or all at once; whether one alone was killed."""
        if only is not None:
            alone = self.processes[only].kill().status == KILLED
            time.sleep(0.05)
        for process in self.processes:
            process.kill()
        return only is not None and alone

    def wait(self) -> list[int]:
        """The exit statuses of all ranks."""
        return [process.wait().status for process in self.processes]

    def said(self) -> str:
        """The last words of all ranks."""
        return "\n".join(log.read_text(errors="replace")[-700:] for log in self.logs)


@contextlib.contextmanager
def _nothing_is_unpickled() -> Iterator[None]:
    import torch
    from torch.distributed import distributed_c10d

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something was unpickled")

    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (distributed_c10d, "_unpickler"),
    ):
        setattr(owner, name, refuse)
    yield


if __name__ == "__main__":
    sys.exit(main())
