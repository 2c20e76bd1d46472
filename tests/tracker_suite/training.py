"""Runs that are sent to trackio and wandb themselves, without a network: what they hold afterwards.

Run by ``make test-trackers``; ``make test`` has a stand-in for both.
"""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openmythos.train.metrics import read_metrics
from openmythos.train.tracking import PROJECT, scalars

Numbers = dict[tuple[int, str], float]
BLOCK, HEADER = 32768, 7  # of the log that wandb writes, LevelDB's


def train(out: Path, library: str, steps: int) -> None:
    few = ("model.d_model=16", "train.eval_loops=[1,2]", "train.eval_every=10", "train.log_every=5")
    command = [sys.executable, "-m", "openmythos", "train", "tiny", "--data", "hops"]
    command += ["--steps", str(steps), "--batch-size", "4", "--out", str(out)]
    for change in (*few, f"train.track={library}"):
        command += ["--set", change]
    own = {"WANDB_MODE": "offline", "WANDB_DIR": str(out.parent), "WANDB_SILENT": "true"}
    own |= {"TRACKIO_DIR": str(out.parent / "trackio"), "PYTHONPATH": os.getcwd()}
    subprocess.run(command, env={**os.environ, **own}, check=True, cwd=out.parent)


def sent(out: Path) -> Numbers:
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "kind" in row]
    return {(row["step"], name): value for row in rows for name, value in scalars(row)}


def in_trackio(folder: Path) -> tuple[set[str], Numbers]:
    """The runs, and each number by its step."""
    with sqlite3.connect(folder / "trackio" / f"{PROJECT}.db") as database:
        rows = list(database.execute("select run_name, step, metrics from metrics"))
    found = {(step, name): v for _, step, text in rows for name, v in json.loads(text).items()}
    return {run for run, _, _ in rows}, found


def in_wandb(folder: Path) -> tuple[set[str], Numbers]:
    """The same of every offline log."""
    from wandb.proto import wandb_internal_pb2

    runs, found = set[str](), Numbers()
    logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2
    for data in (data for log in logs for data in log_records(log.read_bytes())):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            runs.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = items.pop("_step", record.history.step.num)
            found |= {(step, k): v for k, v in items.items() if not k.startswith("_")}
    return runs, found


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log after wandb's own header, joined where they cross blocks."""
    place, part = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if left < HEADER or kind == 0:
            place += left
            continue
        part += data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):  # whole, or its last part
            yield part
            part = b""


@pytest.mark.parametrize(("library", "read"), [("trackio", in_trackio), ("wandb", in_wandb)])
def test_a_run_that_goes_on_is_one_run_with_every_number(
    library: str, read: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for steps in (20, 30):
        train(out, library, steps)
    runs, found = read(tmp_path)
    assert len(runs) == 1 and next(iter(runs)).startswith("run-")
    expected = sent(out)
    assert len(expected) > 50 and found == expected
