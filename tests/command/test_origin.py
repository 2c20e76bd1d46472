import json
import shutil
from pathlib import Path

import pytest

from openmythos.command.origin import data_of, puzzle_of, require_text, run_config
from openmythos.folder import PUZZLE_FILE, run_of


def test_a_run_is_found_from_its_checkpoint_alone(text_run: Path, hops_run: Path) -> None:
    for run in (text_run, hops_run):
        newest = next((run / "checkpoints").glob("step-*"))
        assert run_of(run) == run_of(newest) == run
        assert run_config(newest) == run_config(run) != {}
    assert run_of(text_run / "checkpoints") is None or run_of(text_run / "data") is None
    assert data_of(text_run) == data_of(text_run / "data") == text_run / "data"
    assert puzzle_of(text_run) is None
    walks = puzzle_of(hops_run)
    assert walks is not None and walks.config.max_train_hops == 8


def test_what_is_no_run_has_nothing(tmp_path: Path) -> None:
    assert run_of(tmp_path) is None and run_config(tmp_path) == {}
    for text in ("{", "[1]", '{"data": 3}', "{}"):
        (tmp_path / "config.json").write_text(text)
        assert run_config(tmp_path) == {} and puzzle_of(tmp_path) is None
    with pytest.raises(ValueError, match="belongs to no run"):
        data_of(tmp_path)
    with pytest.raises(ValueError, match="without a tokenizer"):
        require_text(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="is no checkpoint: it has no config"):
        require_text(tmp_path)


def test_a_copied_checkpoint_knows_its_run(hops_run: Path, tmp_path: Path) -> None:
    newest = next((hops_run / "checkpoints").glob("step-*"))
    state = json.loads((newest / "training_state.json").read_text())
    (tmp_path / "training_state.json").write_text(json.dumps(state))
    assert run_config(tmp_path) == run_config(hops_run)


def test_a_checkpoint_on_walks_brings_them(hops_run: Path, tmp_path: Path) -> None:
    newest = next((hops_run / "checkpoints").glob("step-*"))
    for name in ("config.json", "model.safetensors", PUZZLE_FILE):
        shutil.copy(newest / name, tmp_path)
    walks, of_run = puzzle_of(tmp_path), puzzle_of(hops_run)
    assert walks is not None and of_run is not None and walks.config == of_run.config
    # As an older version wrote it.
    run = shutil.copytree(hops_run, tmp_path / "run")
    (older,) = run.glob("checkpoints/step-*")
    (older / PUZZLE_FILE).unlink()
    for folder in (run, older):
        found = puzzle_of(folder)
        assert found is not None and found.config == walks.config


def test_a_damaged_configuration_of_a_run_is_not_believed(hops_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(hops_run, tmp_path / "run")
    stored = (run / "config.json").read_text()
    for damaged in (stored.replace('"num_entities": 16', '"num_entities": 17'), "{"):
        assert damaged != stored
        (run / "config.json").write_text(damaged)
        assert run_config(next((run / "checkpoints").glob("step-*"))) == run_config(hops_run)
