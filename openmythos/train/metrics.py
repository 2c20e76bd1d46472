"""``metrics.jsonl``: one JSON object a line, the contract that plots and analysis read.

Training rows have ``"kind": "train"``; held-out rows ``"kind": "validation"``, one a number of
loops. What is not known is left out; a number that is not finite is null.
"""

import contextlib
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openmythos.folder import write_whole
from openmythos.train.display import TrainDisplay
from openmythos.train.validation import Row


class Recorder:
    """Appends rows, shows them, and sends them to TensorBoard if it is installed."""

    def __init__(self, folder: Path, display: TrainDisplay | None = None) -> None:
        self.folder, self.path, self.display = folder, folder / "metrics.jsonl", display
        self.board: Any = None

    def start(self, step: int) -> None:
        """Go on after ``step``: rows past it are dropped, a killed run logs more than it saves."""
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def close(self) -> None:
        """Write what TensorBoard still holds in memory."""
        if self.board is not None:
            self.board.close()
            self.board = None

    def note(self, text: str) -> None:
        """Say something beside the numbers."""
        if self.display is not None:
            self.display.note = text

    def step(
        self, step: int, seconds: float, progress: float, metrics: dict[str, float], logged: bool
    ) -> None:
        """Record a training step; ``logged`` False only moves the display."""
        if self.display is not None:
            self.display.step(step, seconds, progress, metrics)
        if logged:
            self._write([{"kind": "train", "step": step, "seconds": seconds, **metrics}])

    def validation(self, step: int, seconds: float, rows: list[Row]) -> None:
        """Record held-out results of the weights after ``seconds`` of training."""
        head = {"kind": "validation", "step": step, "seconds": seconds}
        self._write([{**head, **row} for row in rows])
        if self.display is not None:
            self.display.validation(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        if self.board is None:
            return
        for row in rows:
            suffix = f"/loops_{row['num_loops']}" if row["kind"] == "validation" else ""
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{row['kind']}/{name}{suffix}", value, row["step"])


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    lost = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return row | lost


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
