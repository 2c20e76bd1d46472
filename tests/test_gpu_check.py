"""The check of a GPU, small and on this CPU: right numbers pass it, and wrong ones do not."""

import json
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from tests.strategies import unchecked

SMALL = gpu_check.Place("cpu", True, time.monotonic() + 1e6)
QUICK = [name for name in gpu_check.CHECKS if name != "speeds"]


@pytest.fixture(scope="module")
def found() -> dict:
    with unchecked(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of compiling and of meshes
        return gpu_check.run(SMALL, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_right_on_this_cpu(name: str, found: dict) -> None:
    assert not found[name]["wrong"]
    assert found[name]["numbers"]


def test_speeds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_original", lambda place: "not installed")
    numbers = gpu_check.run(SMALL, ["speeds"])["speeds"]["numbers"]
    assert set(numbers) == {
        *("dense_looped", "dense_unlooped", "moe_looped", "moe_unlooped", "original")
    }
    assert numbers["dense_looped"]["tokens_per_second"] > 0


def test_wrong_numbers_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    product = gpu_check.grouped_mm
    monkeypatch.setattr(gpu_check, "grouped_mm", lambda x, w, ends: 1.1 * product(x, w, ends))
    alone = lambda name, *_: gpu_check.run(SMALL, [name])[name]  # noqa: E731
    monkeypatch.setattr(gpu_check, "run_apart", alone)
    out = tmp_path / "found.json"
    words = ["gpu_check", "--cpu", "--only", "experts_products", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1
    assert "experts_products: wrong: low is 0.1; at most 0.03 is right" in capsys.readouterr().out
    assert json.loads(out.read_text())["checks"]["experts_products"]["wrong"]


def test_a_check_that_dies_or_hangs_ends_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    found = {}
    for words in ("echo broken >&2; exit 3", "sleep 9"):
        program.write_text(f"#!/bin/sh\n{words}\n")
        program.chmod(0o755)
        found[words] = gpu_check.run_apart("speeds", [], 0.5, tmp_path / "none.json")
    broken, hung = found.values()
    assert "ended with 3: broken" in broken["wrong"][0] and broken["numbers"] == {}
    assert f"speeds: wrong: {broken['wrong'][0]}" in gpu_check.table_of({"speeds": broken})
    # What is slow is not wrong.
    assert hung["wrong"] == [] and "no end" in hung["numbers"]["not finished"]
    assert gpu_check.table_of({"speeds": hung}).startswith("speeds: not finished")


def test_without_time_nothing_is_begun_and_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check", "--cpu", "--seconds", "0"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert not ended.value.code
    told = capsys.readouterr().out
    assert told.count("skipped: the time is over") == 2 * len(gpu_check.CHECKS)


def test_a_check_that_cannot_run_is_wrong_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(place: gpu_check.Place, found: gpu_check.Found) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_check.CHECKS, "broken", broken)
    found = gpu_check.run(SMALL, ["broken", "experts_products"])
    assert found["broken"]["wrong"] == ["RuntimeError: no such kernel"]
    assert not found["experts_products"]["wrong"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    with pytest.raises(SystemExit, match="--cpu runs the checks small"):
        gpu_check.main()
