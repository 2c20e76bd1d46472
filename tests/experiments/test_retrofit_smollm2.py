import json
from pathlib import Path

import pytest

from experiments.retrofit_smollm2 import run
from experiments.retrofit_smollm2.picture import draw

RESULTS = run.HERE / "results" / "results.json"


def test_the_stored_results_are_as_expected(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert run.check(found)
    sizes = found["convert"]
    assert sizes["parameters_retrofitted"] - sizes["parameters"] == 2 * 576**2  # the adapter
    assert len(found["training"]["loops"]) == found["training"]["steps"]
    found["relative_difference"] = 0.01
    assert not run.check(found)
    assert "BAD relative_difference" in capsys.readouterr().out


def test_the_picture_is_drawn_from_them(tmp_path: Path) -> None:
    draw(json.loads(RESULTS.read_text(encoding="utf-8")), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_nothing_is_dropped() -> None:
    assert run.LAYERS.kept == tuple(range(30))
