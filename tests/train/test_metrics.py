import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from openmythos.train.metrics import Recorder, read_metrics
from tests.train.examples import full_disk, lines


def test_rows_are_strict_json(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(0)
    recorder.step(1, 0.5, 0.1, {"loss": 2.0, "rho": float("nan")}, True)
    recorder.step(2, 0.6, 0.2, {"loss": float("inf")}, False)
    recorder.validation(2, 0.6, [{"num_loops": 4, "bits_per_byte": float("inf")}])
    recorder.close()
    assert list(lines(tmp_path / "metrics.jsonl")) == [
        {"kind": "train", "step": 1, "seconds": 0.5, "loss": 2.0, "rho": None},
        {"kind": "validation", "step": 2, "seconds": 0.6, "num_loops": 4, "bits_per_byte": None},
    ]


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    recorder = Recorder(tmp_path)
    recorder.step(1, 1 / 3, 0.1, {"loss": value}, True)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["seconds"]) == (value, 1 / 3)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_that_was_cut_is_dropped(tmp_path: Path, cut: int) -> None:
    recorder = Recorder(tmp_path)
    for step in range(1, 6):
        recorder.step(step, 0.0, 0.0, {"loss": float(step)}, True)
    recorder.validation(4, 0.0, [{"num_loops": 1, "accuracy": 0.5}])
    with recorder.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "train", "step": 4, "loss": 9.0})[:-cut])
    assert len(list(read_metrics(recorder.path))) == 6
    recorder = Recorder(tmp_path)
    recorder.start(4)
    recorder.step(5, 0.0, 0.0, {"loss": 50.0}, True)
    rows = list(lines(recorder.path))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5]
    assert rows[-1]["loss"] == 50.0
    recorder.start(0)
    assert list(read_metrics(recorder.path)) == []


def test_held_out_results_are_complete_or_dropped(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in (2, 4):
        recorder.validation(step, 0.0, [{"num_loops": n, "accuracy": 0.5} for n in (1, 2)])
    assert recorder.start(4) and recorder.start(4, (2, 1))
    assert len(list(read_metrics(recorder.path))) == 4
    assert not recorder.start(4, (1, 3))
    assert [row["step"] for row in read_metrics(recorder.path)] == [2, 2]


def test_damage_in_the_middle_costs_its_lines_only(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in range(1, 4):
        recorder.step(step, 0.0, 0.0, {"loss": 1.0}, True)
    first, second, third = recorder.path.read_bytes().splitlines()
    recorder.path.write_bytes(b"\n".join((first, b"\xff\xfe" + second[2:], b"7", b"{}", third)))
    assert [row["step"] for row in read_metrics(recorder.path)] == [1, 3]


def test_rows_that_a_full_disk_refuses_are_written_when_there_is_room(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.step(1, 0.0, 0.0, {"loss": 1.0}, True)
    size = recorder.path.stat().st_size
    with full_disk(size + 10):  # a part of the next row fits
        with pytest.warns(UserWarning, match=r"metrics\.jsonl cannot be written: file too large"):
            recorder.step(2, 0.0, 0.0, {"loss": 1.0}, True)
        recorder.step(3, 0.0, 0.0, {"loss": 1.0}, True)  # and that is said once
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written"):
            recorder.flush()
        assert recorder.path.stat().st_size == size
    recorder.step(4, 0.0, 0.0, {"loss": 1.0}, True)
    assert [row["step"] for row in lines(recorder.path)] == [1, 2, 3, 4]
    recorder.flush()
    assert [row["step"] for row in lines(recorder.path)] == [1, 2, 3, 4]


class Board:
    """Stands for TensorBoard's writer."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_if_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    found: dict[str, Any] = {}

    def find(name: str) -> Any:
        return found.get(name) if name == "tensorboard" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    recorder = Recorder(tmp_path)
    recorder.start(0)
    assert recorder.board is None
    found["tensorboard"] = object()
    recorder.start(7)
    board = recorder.board
    assert board.purge_step == 8 and board.folder == str(tmp_path / "tensorboard")
    recorder.step(8, 1.5, 0.1, {"loss": 2.0}, True)
    recorder.validation(8, 1.5, [{"num_loops": 4, "bits_per_byte": 3.0}])
    assert ("train/loss", 2.0, 8) in board.scalars
    assert ("validation/bits_per_byte/loops_4", 3.0, 8) in board.scalars
    recorder.close()
    recorder.close()
    assert board.closed
