import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmythos.config.presets import preset
from openmythos.config.schema import to_dict
from openmythos.plan.run_table import COLUMNS, read_runs
from openmythos.plan.scaling_law import sizes


def write_run(folder: Path, loss: float = 1.5, **sampling: Any) -> Path:
    """What reading needs of a run's folder, with a cut last line."""
    folder.mkdir()
    config = {
        "model": to_dict(preset("tiny")),
        "train": {
            "batch_size": 4,
            "depth": {"sampling": sampling or {"kind": "poisson", "mean_recurrence": 6}},
        },
        "data": {"kind": "text", "seq_len": 32},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [
        {"kind": "validation", "step": 5, "num_loops": 1, "bits_per_byte": 9.0},
        {"kind": "train", "step": 9, "loss": 2.0},
        *(
            {"kind": "validation", "step": 10, "num_loops": n, "bits_per_byte": loss / n}
            for n in (4, 1)
        ),
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "valid'
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_run_folders_give_their_newest_losses_by_loops(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", loss=3.0, kind="uniform", low=2, high=8)
    runs = read_runs([first, second])
    assert tuple(runs) == COLUMNS
    once, loop = sizes(preset("tiny"))
    assert runs["once"].tolist() == [once] * 4 and runs["loop"].tolist() == [loop] * 4
    assert runs["num_loops"].tolist() == [6.0, 6.0, 5.0, 5.0]
    assert runs["tokens"].tolist() == [10.0 * 4 * 32] * 4
    assert runs["test_loops"].tolist() == [1.0, 4.0, 1.0, 4.0]
    np.testing.assert_allclose(runs["loss"], [1.5, 0.375, 3.0, 0.75])


def test_loops_are_those_that_were_trained(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    rows = [{"kind": "train", "step": step, "num_loops": 3.0 + step} for step in (1, 2)]
    metrics = folder / "metrics.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows) + metrics.read_text(encoding="utf-8")
    metrics.write_text(text, encoding="utf-8")
    assert read_runs([folder])["num_loops"].tolist() == [4.5, 4.5]


def test_tables_are_read_by_their_columns(tmp_path: Path) -> None:
    table, lines = tmp_path / "runs.csv", tmp_path / "runs.jsonl"
    table.write_text("name,loss,once,tokens\na,2.5,0,1e9\nb,2.25,1,2e9\n", encoding="utf-8")
    rows = [{"loss": 2.5, "once": 0, "tokens": 1e9}, {"loss": 2.25, "once": 1, "tokens": 2e9}]
    lines.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    for path in (table, lines):
        found = read_runs([path])
        assert {name: column.tolist() for name, column in found.items()} == {
            "once": [0.0, 1.0],
            "tokens": [1e9, 2e9],
            "loss": [2.5, 2.25],
        }
    lines.write_text('{"loss": 1, "tokens": 1}\n{"loss": 2}\n', encoding="utf-8")
    assert list(read_runs([lines])) == ["loss"]  # what not every run has is left out


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "loss\n1\n", "a.txt is no run folder and no .csv or .jsonl table"),
        ("a.csv", "loss\n", "a.csv holds no runs with a loss; its columns are once, loop, "),
        ("a.csv", "tokens\n1\n", "holds no runs with a loss"),
        ("a.csv", "loss,tokens\n1,no\n", "row 1: tokens is 'no'; give a number above 0"),
        ("a.csv", "loss,tokens\n1,-2\n", "row 1: tokens is '-2'; give a number above 0"),
        ("a.csv", "loss,tokens\n1\n", "row 1: tokens is null; give a number above 0"),
        ("a.jsonl", '{"loss": NaN}', "row 1: loss is nan; give a number above 0"),
        ("a.jsonl", "[1]", "row 1 is [1]; give an object with once, loop"),
        ("a.jsonl", '{"loss": ', "a.jsonl cannot be read as a table"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r".") as caught:
        read_runs([path])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    table = tmp_path / "a.csv"
    with pytest.raises(ValueError, match="is a table; give it alone"):
        read_runs([run, table])
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="has no held-out bits per byte"):
        read_runs([run])
    (run / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not the folder of a run on text"):
        read_runs([run])
    table.write_text("loss\n" + 5001 * "1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^these are 5,001 losses; a fit takes at most 5,000$"):
        read_runs([table])
    with pytest.raises(FileNotFoundError):
        read_runs([tmp_path / "absent.csv"])
