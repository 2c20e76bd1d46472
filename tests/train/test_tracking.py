import sys
import types
from pathlib import Path
from typing import Any

import pytest

from openmythos.train.tracking import Tracker, scalars
from tests.train.examples import changed, hops_config, measured, run


class Library(types.ModuleType):
    """Stands for trackio and for wandb: the part of their API that both have."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: list[dict[str, Any]] = []
        self.rows: list[tuple[dict[str, float], int]] = []
        self.finished, self.error = 0, None

    def init(self, **options: Any) -> None:
        self.begun.append(options)
        self._fail()

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._fail()
        self.rows.append((numbers, step))

    def finish(self) -> None:
        self.finished += 1

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture(params=["trackio", "wandb"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


TRAIN = {"kind": "train", "step": 3, "seconds": 0.5, "loss": 2.0, "rho": None}
HELD_OUT = {"kind": "validation", "step": 3, "seconds": 0.5, "num_loops": 4, "accuracy": 0.25}


def test_rows_become_scalars() -> None:
    assert dict(scalars(TRAIN)) == {"train/seconds": 0.5, "train/loss": 2.0}
    assert dict(scalars(HELD_OUT)) == {
        "validation/seconds/loops_4": 0.5,
        "validation/accuracy/loops_4": 0.25,
    }


def test_a_run_is_found_again_by_its_folder(library: Library, tmp_path: Path) -> None:
    for _ in range(2):
        tracker = Tracker(library.__name__, tmp_path / "run", {"seed": 1})
        tracker.add(TRAIN)
        tracker.close()
        tracker.close()
    Tracker(library.__name__, tmp_path / "other" / "run", {})
    first, again, other = library.begun
    assert first == again and first["name"] != other["name"]
    assert first["name"].startswith("run-") and first["config"] == {"seed": 1}
    assert first["resume"] == "allow" and first["project"] == "openmythos"
    assert first.get("id") == (first["name"] if library.__name__ == "wandb" else None)
    assert library.rows == 2 * [({"train/seconds": 0.5, "train/loss": 2.0}, 3)]
    assert library.finished == 2


def test_a_tracker_that_fails_is_said_once(library: Library, tmp_path: Path) -> None:
    tracker = Tracker(library.__name__, tmp_path, {})
    library.error = ConnectionError("no\nroute")
    with pytest.warns(
        UserWarning, match=rf"{library.__name__} failed \(no route\); the run goes on"
    ):
        tracker.add(TRAIN)
    library.error = None
    tracker.add(HELD_OUT)
    tracker.close()
    assert not library.rows and not library.finished
    library.error = RuntimeError("no key")
    with pytest.raises(ValueError, match=f"is {library.__name__}, which does not begin: no key"):
        Tracker(library.__name__, tmp_path, {})


def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'openmythos\[trackio\]'"):
        Tracker("trackio", tmp_path, {})


def test_a_run_sends_its_rows(library: Library, tmp_path: Path) -> None:
    config = changed(hops_config(), max_steps=2, eval_every=2, track=library.__name__)
    run(config, tmp_path)
    assert library.begun[0]["config"]["train"]["max_steps"] == 2 and library.finished == 1
    sent = [(step, name) for numbers, step in library.rows for name in numbers]
    for name in ((1, "train/loss"), (2, "train/loss"), (2, "validation/accuracy/loops_2")):
        assert name in sent
    (last,) = [numbers for numbers, step in library.rows if step == 2 and "train/loss" in numbers]
    rows = [row for row in measured(tmp_path) if row["kind"] == "train"]
    assert last["train/loss"] == rows[-1]["loss"]
