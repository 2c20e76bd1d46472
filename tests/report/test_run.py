import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from openmythos.config import presets
from openmythos.config.schema import to_dict
from openmythos.folder import locked
from openmythos.report.page import Piece, Sample
from openmythos.report.run import PANELS, read_run, render_run, write_run_page
from openmythos.train.recipe import HopsData, RunConfig, TextData, TrainConfig
from tests.report.parser import Page

SAMPLES = [Sample("go <on>", [Piece(" a & b", 1), Piece("\x1b[2J", 3)])]


def write_run(folder: Path, rows: list[dict[str, Any]], hops: bool = False) -> Path:
    """A run's folder with these lines of metrics."""
    config = RunConfig(
        model=presets.preset("tiny"),
        train=TrainConfig(max_steps=100),
        data=HopsData() if hops else TextData(source="<b>text</b>", seq_len=32),
    )
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def train_row(step: int, **numbers: Any) -> dict[str, Any]:
    row = {"kind": "train", "step": step, "seconds": step / 10, "loss": 4.0 / step}
    return {**row, "num_loops": 2.0 + step % 3, "tokens_per_second": 1000.0, **numbers}


def held_out(step: int, name: str, *values: float) -> list[dict[str, Any]]:
    head = {"kind": "validation", "step": step, "seconds": step / 10}
    return [{**head, "num_loops": 2**i, name: value} for i, value in enumerate(values)]


def text_rows(last: int) -> list[dict[str, Any]]:
    more = {"bits_per_byte": 2.5, "lr_factor": 0.5, "state_norm": 9.0, "rho": 0.4, "grad_norm": 1.0}
    loads = {f"max_violation_loop_{loop}": 0.1 * loop for loop in range(5)}
    rows = [train_row(step, **more, **loads) for step in range(1, last + 1)]
    evaluated = (held_out(step, "bits_per_byte", 3.0, 2.0, 2.1) for step in (last // 2, last))
    return [*rows, *(row for part in evaluated for row in part)]


def checked(folder: Path) -> tuple[str, Page]:
    """A run's page, read strictly; it refers to nothing outside itself."""
    text = render_run(read_run(folder))
    page = Page(text)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)) and "url(http" not in text and "@import" not in text
    assert all(page.labels)
    return text, page


def test_the_page_of_a_run_on_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my & run", text_rows(100))
    old, new = (run / "samples" / f"step-{step:08d}.json" for step in (50, 100))
    old.write_text("[]", encoding="utf-8")
    new.write_text(json.dumps([asdict(sample) for sample in SAMPLES]), encoding="utf-8")
    text, page = checked(run)
    said = " ".join(page.words)
    assert "<title>my &amp; run: an OpenMythos run</title>" in text
    for words in (
        "my & run",
        "done, 100 steps",
        "2.000",
        "bits/byte, 2 loops",
        "go <on>",
        " a & b",
    ):
        assert words in said
    assert "100" in said and '"source": "<b>text</b>"' in said  # the configuration
    loss, bits, depth, curves, steps = page.labels
    assert "from 4.000 to 0.040 at step 100" in loss and "bits per byte" in bits
    assert "3.000 at 1, 2.000 at 2, 2.100 at 4" in depth and "by loops" in curves
    for title in ("Learning rates", "State norm", "rho(A)", "Load of the fullest expert"):
        assert title in steps
    assert set(PANELS) - {"stage"} < set(read_run(run).train[0])
    names = [words for words in page.words if words.startswith("loop ")]
    assert names == ["loop 1", "loop 3", "loop 5"]  # of five loops: first, middle, last


def test_the_page_of_a_run_on_walks(tmp_path: Path) -> None:
    rows = [train_row(step, stage=float(1 + step // 40)) for step in range(1, 101)]
    run = write_run(tmp_path / "walks", [*rows, *held_out(100, "accuracy", 0.2, 0.9)], hops=True)
    text, page = checked(run)
    said = " ".join(page.words)
    assert "accuracy, 2 loops" in said and "0.900" in said and "higher is better" in text
    assert "Longest walks, in hops" in page.labels[-1] and "What it writes" not in said


def test_a_run_that_trains_was_stopped_or_has_not_begun(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    text, _ = checked(run)
    assert "No step is logged yet" in text and "stopped at step 0 of 100" in text
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps(train_row(1)) + "\n" + json.dumps(train_row(2))[:-9])  # cut by a kill
    text, _ = checked(run)
    assert "stopped at step 1 of 100; the same command goes on" in text
    with locked(run):
        assert "training now, step 1 of 100" in checked(run)[0]
    (run / "metrics.jsonl").unlink()
    assert read_run(run).step == 0


def test_numbers_that_are_lost_or_not_finite(tmp_path: Path) -> None:
    lost = train_row(2, loss=None, rho=None)
    rows = [train_row(1, rho=None), lost, *held_out(2, "bits_per_byte", math.nan)]
    rows[-1]["bits_per_byte"] = None
    run = write_run(tmp_path / "run", rows)
    (run / "samples" / "step-00000002.json").write_text('[{"prompt": 1}]', encoding="utf-8")
    text, _ = checked(run)
    assert "rho(A)" not in text and "What it writes" not in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    inside = write_run(tmp_path / "demo" / "text", [])
    with pytest.raises(ValueError, match=r"holds no config.json; give one of the runs in it: text"):
        read_run(inside.parent)
    with pytest.raises(ValueError, match=r"holds no config.json; give a run's folder"):
        read_run(tmp_path)
    config = inside / "config.json"
    for content, said in (("{", "is not JSON"), ("{}", "is not the folder of a run")):
        config.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            read_run(inside)


def test_the_page_is_written_where_it_is_wanted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text_rows(4))
    assert write_run_page(run) == run / "report.html"
    page = write_run_page(run, tmp_path / "elsewhere" / "page.html")
    assert page.read_text(encoding="utf-8") == (run / "report.html").read_text(encoding="utf-8")
    assert replace(read_run(run), holder="process 1").status.startswith("training now")
