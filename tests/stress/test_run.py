import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_two_kills_and_one_of_each_lose_nothing(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "tests.stress.run", "--quick", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=repo_root)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["lost"] == results["wrong"] == 0
    counts = {row["kind"]: row["count"] for row in results["kinds"]}
    assert counts["training killed and resumed"] == 2
    assert len(counts) >= 14
    assert "| training killed and resumed | 2 | 0 | 0 |" in (tmp_path / "results.md").read_text()
