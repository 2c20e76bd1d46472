"""The live view of a training run: a progress bar, smoothed metrics, held-out results."""

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openmythos.train.validation import Row

SHOWN = (  # metric, label, format
    ("loss", "loss", "{:.3f}"),
    ("bits_per_byte", "bits/byte", "{:.3f}"),
    ("stage", "hops", "{:.0f}"),
    ("num_loops", "loops", "{:.1f}"),
    ("state_norm", "|h|", "{:.1f}"),
    ("rho", "rho(A)", "{:.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)
EXACT = ("stage", "rho")  # shown as they are; the others are smoothed


class TrainDisplay:
    """Shows a run live in a terminal; elsewhere it prints a line every ``line_seconds``.

    ``note`` is a remark shown below the numbers; ``max_steps`` is the last step, if one is known.
    """

    line_seconds = 10.0
    frame_seconds = 0.2

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.max_steps: int | None = None
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self.rows: list[Row] = []
        self.note = ""
        self.smooth: dict[str, float] = {}
        self.step_done, self.seconds, self.progress = 0, 0.0, 0.0
        self.next_shown = 0.0

    def __enter__(self) -> "TrainDisplay":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.update(self._render())
            self.live.stop()

    def step(self, step: int, seconds: float, progress: float, metrics: dict[str, float]) -> None:
        """Show a training step; ``progress`` is the share of the run done after it."""
        self.step_done, self.seconds, self.progress = step, seconds, progress
        for name, value in metrics.items():
            before = value if name in EXACT else self.smooth.get(name, value)
            self.smooth[name] = 0.9 * before + 0.1 * value
        now = time.monotonic()
        if now < self.next_shown:
            return
        self.next_shown = now + (self.line_seconds if self.live is None else self.frame_seconds)
        if self.live is not None:
            self.live.update(self._render())
        else:
            numbers = "  ".join(f"{label} {text}" for label, text in self._numbers())
            note = f"  {self.note}" if self.note else ""
            self.console.print(f"{self.title}: {self._done()}  {numbers}{note}")

    def validation(self, rows: list[Row]) -> None:
        """Show held-out results; they stay until the next ones."""
        self.rows = rows
        if self.live is not None:
            self.live.update(self._render())
        elif rows:
            self.console.print(f"{self.title}: held-out {self._held_out()}")

    def _numbers(self) -> list[tuple[str, str]]:
        loads = [v for name, v in self.smooth.items() if name.startswith("max_violation")]
        shown = [
            (label, form.format(self.smooth[name]))
            for name, label, form in SHOWN
            if name in self.smooth
        ]
        return [*shown, ("expert load", f"+{max(loads):.0%}")] if loads else shown

    def _done(self) -> str:
        """How far the run is: share, step of all steps, and the time left."""
        done = self.progress
        steps = (
            f"{self.step_done}" if self.max_steps is None else f"{self.step_done}/{self.max_steps}"
        )
        left = f"  {self.seconds / done - self.seconds:.0f} s left" if done > 0.005 else ""
        return f"{done:4.0%}  step {steps}{left}"

    def _held_out(self) -> str:
        parts = []
        for row in self.rows:
            value = row.get("bits_per_byte", row.get("accuracy"))
            parts.append(f"{row['num_loops']} loops {value:.3f}")
        return "  ".join(parts)

    def _render(self) -> RenderableType:
        done = self.progress
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=1.0, completed=done, width=32),
            Text(self._done(), style="cyan"),
        )
        numbers = Table.grid(padding=(0, 2))
        cells = [Text.assemble((f"{name} ", "dim"), value) for name, value in self._numbers()]
        numbers.add_row(*cells)
        parts: list[RenderableType] = [head, numbers]
        if self.rows:
            parts.append(Text.assemble(("held-out  ", "dim"), self._held_out()))
        if self.note:
            parts.append(Text(self.note))
        return Group(*parts)
