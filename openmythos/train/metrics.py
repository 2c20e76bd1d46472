"""``metrics.jsonl``: one JSON object per line, the format that plots and analysis read.

Training rows have ``"kind": "train"``. Held-out rows have ``"kind": "validation"``, one row per
number of loops. Unknown metrics are left out; a number that is not finite is null.
"""

import contextlib
import importlib.util
import json
import math
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from openmythos.folder import append, write_whole
from openmythos.train.display import TrainDisplay
from openmythos.train.tracking import Tracker, scalars
from openmythos.train.validation import Row


class Recorder:
    """Appends rows to ``metrics.jsonl``, shows them, and logs to TensorBoard if it is installed.

    They are sent to the tracker, too, if there is one. Over ranks, one of them ``writes``.
    """

    def __init__(
        self,
        folder: Path,
        display: TrainDisplay | None = None,
        *,
        tracker: Tracker | None = None,
        writes: bool = True,
    ) -> None:
        self.folder, self.path, self.display = folder, folder / "metrics.jsonl", display
        self.tracker, self.writes = tracker, writes
        self.board: Any = None
        self.unwritten: list[str] = []  # lines that a full disk refused

    def start(self, step: int, validation: Collection[int] = ()) -> bool:
        """Continue after ``step``: later rows, which a killed run logged, are dropped.

        Args:
            step: The last step that is done.
            validation: The numbers of loops of which held-out results of this step are due.

        Returns:
            Whether these results are there; if some are missing, all of them are dropped.
        """
        rows = list(read_metrics(self.path)) if self.path.exists() else []
        at_step = [row for row in rows if row["kind"] == "validation" and row["step"] == step]
        complete = {row.get("num_loops") for row in at_step} >= {*validation}
        rows = [r for r in rows if r["step"] <= step and (complete or r not in at_step)]
        if self.path.exists():
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        return complete

    def flush(self) -> None:
        """Write the rows that a full disk refused; every later row tries that, too.

        Raises:
            OSError: They still cannot be written.
        """
        if self.unwritten:
            append(self.path, "".join(self.unwritten))
            self.unwritten.clear()

    def close(self) -> None:
        """Close TensorBoard's writer, which flushes it, and the tracker."""
        if self.tracker is not None:
            self.tracker.close()
        if self.board is not None:
            self.board.close()
            self.board = None

    def note(self, text: str) -> None:
        """Show a remark below the numbers."""
        if self.display is not None:
            self.display.note = text

    def step(
        self, step: int, seconds: float, progress: float, metrics: dict[str, float], logged: bool
    ) -> None:
        """Show a training step, and write it if ``logged``."""
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
        if not self.writes:
            return
        is_first = not self.unwritten
        self.unwritten += [json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows]
        try:
            self.flush()
        except OSError as error:
            if is_first:
                warnings.warn(f"{error}; its rows are kept until there is room", stacklevel=3)
        for row in rows:
            if self.tracker is not None:
                self.tracker.add(row)
            if self.board is not None:
                for name, value in scalars(row):
                    self.board.add_scalar(name, value, row["step"])


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    lost = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return row | lost


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics file; an incomplete last line, left by a kill, and damage are skipped."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and {"kind", "step"} <= row.keys():
                yield row


def last_validation(path: Path) -> list[dict[str, Any]]:
    """The newest held-out results of a metrics file, one row per number of loops."""
    rows = [row for row in read_metrics(path) if row["kind"] == "validation"]
    newest = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] == newest]
