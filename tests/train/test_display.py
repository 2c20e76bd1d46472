import io

import pytest
from rich.console import Console

from openmythos.train.display import TrainDisplay
from openmythos.train.metrics import Recorder

METRICS = {
    "loss": 2.5,
    "bits_per_byte": 1.25,
    "num_loops": 4.0,
    "state_norm": 12.3,
    "rho": 0.447,
    "grad_norm": 0.9,
    "tokens_per_second": 12_345.0,
    "max_violation_loop_0": 0.2,
    "max_violation_loop_1": 0.31,
    "lr_factor": 1.0,
}


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=160, highlight=False), file


def test_without_a_terminal_it_prints_a_line_now_and_then() -> None:
    screen, file = console(False)
    with TrainDisplay(screen, "text") as display:
        display.max_steps = 100
        for step in range(1, 50):
            display.step(step, step / 10, step / 100, METRICS)
        display.validation([{"num_loops": 2, "bits_per_byte": 1.5}])
        display.validation([])
    first, second = file.getvalue().splitlines()
    assert first == (
        "text:   1%  step 1/100  10 s left  loss 2.500  bits/byte 1.250  loops 4.0  "
        "|h| 12.3  rho(A) 0.447  grad 0.90  tokens/s 12,345  expert load +31%"
    )
    assert second == "text: held-out 2 loops 1.500"
    assert "\x1b" not in file.getvalue()


def test_a_line_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, file = console(False)
    now = 100.0
    monkeypatch.setattr("openmythos.train.display.time.monotonic", lambda: now)
    display = TrainDisplay(screen, "text")
    for step in range(1, 22):
        now += 1.0
        display.step(step, 0.0, 0.0, {"loss": 1.0})
    steps = [line.split("step ")[1].split()[0] for line in file.getvalue().splitlines()]
    assert steps == ["1", "11", "21"]


def test_in_a_terminal_it_shows_a_bar_and_the_last_numbers() -> None:
    screen, file = console(True)
    with TrainDisplay(screen, "hops") as display:
        display.step(1, 1.0, 0.01, {"loss": 3.0, "stage": 2.0})
        display.validation([{"num_loops": 8, "accuracy": 0.75}])
        display.step(300, 50.0, 0.5, {"loss": 3.0, "stage": 3.0})
        Recorder.note(recorder_of(display), "saving after this step")
    shown = file.getvalue()
    assert "hops" in shown and "\x1b[" in shown
    assert " 50%  step 300  50 s left" in shown  # the last step, also when it came within a frame
    assert "8 loops 0.750" in shown
    assert "saving after this step" in shown


def recorder_of(display: TrainDisplay) -> Recorder:
    recorder = object.__new__(Recorder)
    recorder.display = display
    return recorder


def test_noisy_numbers_are_smoothed_and_exact_ones_are_not() -> None:
    display = TrainDisplay(console(False)[0], "x")
    for loss, stage in ((2.0, 1.0), (4.0, 5.0)):
        display.step(1, 0.0, 0.0, {"loss": loss, "stage": stage})
    assert display.smooth["loss"] == pytest.approx(2.2)
    assert display.smooth["stage"] == 5.0


def test_the_screen_comes_back_after_an_error() -> None:
    screen, file = console(True)

    def fail() -> None:
        with TrainDisplay(screen, "text") as display:
            display.step(1, 1.0, 0.0, {"loss": 1.0})
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert file.getvalue().endswith("\x1b[?25h")  # the cursor is visible again
