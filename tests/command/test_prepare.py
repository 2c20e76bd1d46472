import json
from pathlib import Path

from tests.command.conftest import Invoke, refused


def test_prepare_as_json_and_as_a_table(invoke: Invoke, tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "data"
    report = json.loads(invoke("prepare", text_file, "--out", out, "--vocab-size", 280, "--json"))
    assert report["folder"] == str(out) and report["vocab_size"] <= 280
    assert report["train"]["bytes"] + report["val"]["bytes"] > 0.9 * text_file.stat().st_size
    assert report["train"]["tokens"] > report["val"]["tokens"] > 0
    table = invoke("prepare", text_file, "--out", tmp_path / "bytes", "--bytes")
    assert "vocabulary 259" in table and "bytes/token" in table
    everything = invoke(
        "prepare", text_file, "--out", tmp_path / "all", "--bytes", "--val-fraction", 0
    )
    assert "val" in everything


def test_prepare_refuses_what_it_cannot_read(invoke: Invoke, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty.txt" in refused(invoke, "prepare", empty, "--out", tmp_path / "data")
    assert "absent" in refused(invoke, "prepare", tmp_path / "absent", "--out", tmp_path / "data")
