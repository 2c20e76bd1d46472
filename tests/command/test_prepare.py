import json
from pathlib import Path

from typer.testing import CliRunner

from openmythos.cli import app
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


def test_prepare_from_standard_input_and_with_bad_rows(invoke: Invoke, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(30)) + '{"te')
    command = ("prepare", rows, "--out", tmp_path / "rows", "--bytes", "--json")
    assert "line 31 is not JSON" in refused(invoke, *command)
    report = json.loads(invoke(*command, "--skip-bad"))
    assert (report["num_duplicates"], report["num_replaced"], report["num_left_out"]) == (0, 0, 1)
    assert report["left_out"][0].startswith(f"{rows} line 31")
    piped = ("prepare", "-", "--out", tmp_path / "piped", "--bytes")
    result = CliRunner().invoke(app, [*map(str, piped)], input="One sentence. " * 300)
    assert result.exit_code == 0 and "vocabulary 259" in result.stdout
    assert "documents, " in result.stderr and "0 left out" in result.stderr


def test_prepare_refuses_what_it_cannot_read(invoke: Invoke, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty.txt" in refused(invoke, "prepare", empty, "--out", tmp_path / "data")
    assert "absent" in refused(invoke, "prepare", tmp_path / "absent", "--out", tmp_path / "data")
