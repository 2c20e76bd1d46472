import json
from pathlib import Path

from tests.command.conftest import Invoke, refused


def test_train_has_written_the_page(text_run: Path, hops_run: Path) -> None:
    for run, words in ((text_run, "What it writes"), (hops_run, "Held-out accuracy")):
        page = (run / "report.html").read_text(encoding="utf-8")
        assert words in page and "done, 4 steps" in page


def test_report(invoke: Invoke, text_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert invoke("report", text_run, "--out", page) == f"{page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    said = json.loads(invoke("report", text_run, "--out", page, "--json"))
    assert said["status"] == "done, 4 steps" and said["step"] == 4 and said["page"] == str(page)
    assert [row["num_loops"] for row in said["held_out"]] == [1, 2]
    assert "holds no config.json" in refused(invoke, "report", tmp_path)
