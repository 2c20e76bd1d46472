"""The runs that are disturbed, and what they are compared with: runs that nothing disturbed."""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openmythos.checkpoint.save import save_pretrained
from openmythos.config import LearnedLoopConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.data.prepare import prepare
from openmythos.folder import damage
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.recipe import RunConfig
from tests.strategies import random_model
from tests.stress.process import Ended, Process, run
from tests.train.examples import (
    changed,
    hops_config,
    measured,
    text_config,
    tiny_model,
    write_config,
    write_text,
)

KINDS = ("text", "walks", "from a checkpoint", "adapter")


@dataclass
class Row:
    """One line of the table: how often something was tried, and what went wrong."""

    kind: str
    count: int = 0
    lost: int = 0
    wrong: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def note(self, name: str, number: int = 1) -> None:
        """Count something besides."""
        self.notes[name] = self.notes.get(name, 0) + number

    def fail(self, what: str, *, lost: bool = False) -> None:
        """Count a failure and keep its words."""
        self.lost += lost
        self.wrong += not lost
        self.failures.append(what)


def make_config(kind: str, room: Path, steps: int) -> RunConfig:
    """A run of a kind that saves after every step; its files are in ``room``."""
    if kind == "walks":
        return changed(hops_config(), max_steps=steps, save_every=1, eval_every=8)
    source = write_text(room, 60)
    if kind == "text":
        return text_config(source, max_steps=steps)
    # The adapter has a change per loop in the core, which needs a model whose loops differ.
    signal = LearnedLoopConfig(num_loops=2) if kind == "adapter" else None
    adapter = AdapterConfig(rank=2, num_loops=2) if kind == "adapter" else None
    start = replace(tiny_model(), vocab_size=264, loop_embedding=signal)
    save_pretrained(random_model(start), room / "start", byte_tokenizer())
    prepare(str(source), room / "prepared", tokenizer=byte_tokenizer())
    config = text_config(
        room / "prepared", max_steps=steps, init_from=str(room / "start"), grad_accumulation=2
    )
    return replace(changed(config, adapter=adapter), model=start)


class Reference:
    """A run that was never stopped, with all its checkpoints."""

    def __init__(self, kind: str, room: Path, steps: int) -> None:
        self.kind, self.room, self.steps = kind, room, steps
        room.mkdir(parents=True)
        made = run(lambda: str(write_config(make_config(kind, room, steps), self.file)), self.log)
        assert made.status == 0, made.said
        self.folder = room / "whole"
        keep = [*self.command(self.folder), "--set", "train.keep_checkpoints=1000"]
        process = Process(keep, self.log)
        process.wait_for(lambda: process.holds(self.folder))
        with clock() as passed:
            ended = process.wait()
        assert ended.status == 0, ended.said
        self.seconds = passed()
        self.facts = {path.name: facts(path) for path in checkpoints(self.folder)}
        self.metrics = measured(self.folder)

    @property
    def file(self) -> Path:
        return self.room / "config.json"

    @property
    def log(self) -> Path:
        return self.room / "log.txt"

    def command(self, out: Path) -> list[object]:
        """The command that begins the run in ``out`` and goes on with it."""
        return ["train", "--config", self.file, "--out", out]

    def differs(self, out: Path) -> str | None:
        """What of a finished run differs from this one, bit for bit; None: nothing."""
        newest = max(checkpoints(out), default=None)
        if newest is None or newest.name != max(self.facts):
            return f"the newest checkpoint is {newest}"
        if facts(newest) != self.facts[newest.name]:
            return "the last checkpoint differs"
        return None if measured(out) == self.metrics else "the metrics differ"

    def finish(self, row: Row, out: Path, what: str, *, fresh: bool = False) -> Ended:
        """Run the command to its end, and compare."""
        ended = run(self.command(out), self.log, fresh=fresh)
        if ended.status != 0:
            row.fail(f"{what}: status {ended.status}: {ended.said[-500:]}", lost=True)
        elif problem := self.differs(out):
            row.fail(f"{what}: {problem}")
        return ended


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("step-????????"))


def facts(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint that no clock decides: weights, optimisers, task and guard."""
    found = damage(checkpoint)
    if found is not None or not (checkpoint / "manifest.json").exists():
        return {"damage": found or "manifest.json is missing"}
    record = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
    state = {k: v for k, v in record["state"].items() if k != "seconds"}
    tensors = [digest(path) for path in sorted(checkpoint.glob("*.safetensors"))]
    config = (checkpoint / "config.json").read_text(encoding="utf-8")
    return {
        "damage": None,
        "state": state,
        "tensors": tensors,
        "task": record["task"],
        "config": config,
    }


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def last_step(folder: Path) -> int:
    """The last training step in the metrics of a run, 0 if there is none."""
    if not (folder / "metrics.jsonl").exists():
        return 0
    return max((row["step"] for row in measured(folder) if row["kind"] == "train"), default=0)


@contextmanager
def clock() -> Iterator[Any]:
    """Yield a function that says how many seconds have passed."""
    import time

    started = time.monotonic()
    yield lambda: time.monotonic() - started


def seeded(name: str) -> random.Random:
    """Random numbers that depend on a name only."""
    return random.Random(f"stress {name}")
