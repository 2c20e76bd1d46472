import importlib
from functools import partial
from pathlib import Path

import pytest

from openmythos.analysis.pairs import puzzle_pairs


def test_it_trains_and_prints_a_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("experiments.01_with_the_library.with_the_library")
    monkeypatch.setattr(script, "puzzle_pairs", partial(puzzle_pairs, num_examples=8))
    monkeypatch.setattr(script, "LONGER", 3)
    script.main(["--out", str(tmp_path / "run"), "--steps", "2"])
    said = capsys.readouterr().out
    assert "3 hops, never trained, right by loops: {4: " in said
    assert "start    r1    r2" in said and "bits between neighbouring loops: (" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("loop ")]
    assert len(rows) in range(4, 9) and all(len(row) == 2 + 3 for row in rows)
