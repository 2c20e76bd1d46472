"""``openmythos calibrate-exit`` on runs that were hardly trained, and its use by ``serve``."""

import json
import shutil
from pathlib import Path

import pytest

from openmythos.checkpoint.save import EXIT_FILE, EXIT_PICTURE, save_pretrained
from openmythos.command import calibrate_exit as command
from openmythos.command.serve import choice_for
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_pretrained
from tests.command.conftest import Invoke, refused
from tests.strategies import unchecked

FEW = ("--num-tokens", 12, "--max-loops", 3, "--max-rows", 4)


def test_a_run_on_text(invoke: Invoke, text_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    with unchecked():
        said = invoke("calibrate-exit", run, *FEW, "--within", 5)
    newest = run / "checkpoints" / "step-00000004"
    assert (newest / EXIT_PICTURE).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((newest / EXIT_FILE).read_text())
    assert stored["num_loops"] == 1 and stored["exit_rule"] is None  # nothing is worth two loops
    assert stored["metric"] == "bits_per_byte" and len(stored["points"]) == 3
    assert "<- chosen" in said and "no rule is worth its cost" in said
    load_pretrained(run)  # as intact as before


def test_a_run_on_walks(invoke: Invoke, hops_run: Path, tmp_path: Path) -> None:
    options = (*FEW, "--max-size", 2, "--within", 0, "--out", tmp_path, "--json")
    with unchecked():
        printed = json.loads(invoke("calibrate-exit", hops_run, *options))
    assert printed == json.loads((tmp_path / EXIT_FILE).read_text())
    assert printed["metric"] == "accuracy" and printed["processor"]
    depths = [each["num_loops"] for each in printed["points"] if each["exit_rule"] is None]
    assert depths == [1, 2, 3]


def test_mistakes_are_one_line(invoke: Invoke, text_run: Path, hops_run: Path) -> None:
    assert "--within is -1" in refused(invoke, "calibrate-exit", text_run, "--within=-1")
    assert "--within is nan" in refused(invoke, "calibrate-exit", text_run, "--within=nan")
    assert "--max-size is for" in refused(invoke, "calibrate-exit", text_run, "--max-size", 2)
    said = refused(invoke, "calibrate-exit", hops_run, "--max-size", 80)
    assert "--max-size is 80" in said
    assert "absent" in refused(invoke, "calibrate-exit", "absent")
    used = text_run / "config.json"
    with pytest.raises(OSError, match=r"config\.json is no folder$"):
        invoke("calibrate-exit", text_run, *FEW, "--out", used)


def test_a_model_that_ships_is_calibrated_elsewhere(invoke: Invoke, tmp_path: Path) -> None:
    said = refused(invoke, "calibrate-exit", "zoo:text", *FEW)
    assert "zoo:text is part of the package: give a folder for exit.json as --out" in said
    assert "openmythos convert zoo:text --out COPY" in said
    with unchecked():
        invoke("calibrate-exit", "zoo:text", *FEW, "--within", 5, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / EXIT_FILE).read_text())["metric"] == "bits_per_byte"
    assert not (local_folder("zoo:text") / EXIT_FILE).exists()
    invoke("convert", "zoo:text", "--out", tmp_path / "copy")
    with unchecked():
        invoke("calibrate-exit", tmp_path / "copy", *FEW, "--within", 5)
    choice = choice_for(tmp_path / "copy", load_pretrained(tmp_path / "copy"))
    assert choice is not None and choice.num_loops == 1


def test_a_folder_that_is_read_only_says_what_to_do(
    invoke: Invoke, text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(f"{path} cannot be written: permission denied")

    monkeypatch.setattr(command, "require_writable", refuse)
    said = refused(invoke, "calibrate-exit", text_run, *FEW)
    assert "permission denied" in said and "as --out" in said


def test_serve_takes_the_choice_and_warns_elsewhere(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_pretrained(text_run)
    folder = save_pretrained(model, tmp_path / "model")
    assert choice_for(folder, model) is None
    stored = {"version": 1, "num_loops": 3, "processor": "a processor of long ago"}
    stored["exit_rule"] = {"kind": "kl", "threshold": 0.5}
    (folder / EXIT_FILE).write_text(json.dumps(stored))
    choice = choice_for(folder, model)
    assert choice is not None and choice.num_loops == 3 and choice.exit_rule is not None
    said = capsys.readouterr().err
    assert "was measured on a processor of long ago" in said and "calibrate-exit again" in said
    stored["exit_rule"] = {"kind": "cumulative_threshold", "threshold": 0.5}
    (folder / EXIT_FILE).write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="is of another model: exit rule 'cumulative_threshold'"):
        choice_for(folder, model)
    save_pretrained(model, folder)  # other weights, of which nothing was measured
    assert choice_for(folder, model) is None
