import json
from pathlib import Path

import pytest

from openmythos.ops.cpu import build, choice
from openmythos.ops.cpu.choice import Timing


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Choices by measurement, kept in a file of this test."""
    path = tmp_path / "timings.json"
    monkeypatch.setenv(choice.VARIABLE, "measure")
    monkeypatch.setattr(choice, "timings_file", lambda num_threads: path)
    monkeypatch.setattr(choice, "_TIMINGS", {})
    return path


@pytest.mark.parametrize(("ours", "wins"), [(1.0, True), (1.05, False), (2.0, False)])
def test_ours_must_win_by_a_tenth(stored: Path, ours: float, wins: bool) -> None:
    assert choice.ours_wins("linear 4 x 4, rows 1", lambda: Timing(ours, 1.1)) is wins


def test_a_product_is_timed_once_and_remembered(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def measure() -> Timing:
        calls.append(1)
        return Timing(1.0, 2.0)

    assert choice.ours_wins("a", measure) and choice.ours_wins("a", measure)
    assert len(calls) == 1
    monkeypatch.setattr(choice, "_TIMINGS", {})  # as in another process
    assert choice.ours_wins("a", measure)
    assert len(calls) == 1
    assert json.loads(stored.read_text(encoding="utf-8")) == {"a": {"ours": 1.0, "torch": 2.0}}
    stored.write_text("{", encoding="utf-8")  # damaged: timed again
    monkeypatch.setattr(choice, "_TIMINGS", {})
    assert choice.ours_wins("a", measure)
    assert len(calls) == 2


def test_the_environment_decides_without_a_timing(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word, wins in (("ours", True), ("torch", False)):
        monkeypatch.setenv(choice.VARIABLE, word)
        assert choice.ours_wins("a", lambda: pytest.fail("timed")) is wins
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(ValueError, match="OPENMYTHOS_KERNELS is 'fast'; it must be measure, ours"):
        choice.ours_wins("a", lambda: pytest.fail("timed"))


def test_a_race_alternates_and_leaves_the_first_run_out() -> None:
    order: list[str] = []
    timing = choice.race(lambda: order.append("ours"), lambda: order.append("torch"), 2)
    assert order == ["ours", "torch"] * (1 + choice.REPEATS)
    assert 0 <= timing.ours < 1 and 0 <= timing.torch < 1


def test_kept_kernels_are_used_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_load", lambda name: name != "experts")
    with choice.keeping(None) as used:
        assert used == ["attention"]
    with choice.keeping([]) as used:
        assert used == [] and not build.load("attention") and build.load("narrow")
    assert build.load("attention")
    with (
        pytest.warns(UserWarning, match="our kernels for experts so far"),
        choice.keeping(["attention", "experts"]) as used,
    ):
        assert used == ["attention"]
