import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.depth_dial.arms import config_of
from experiments.equal_accuracy import RECORD, course, keeping_checkpoints, table
from experiments.run_store import Run
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.run import Run as Training
from openmythos.train.run import set_up


@pytest.fixture
def trained(tmp_path: Path) -> Training:
    """Six steps with a checkpoint after every second, and one after a stop at the third."""
    config = config_of(Run("fixed_longest", 0, {"steps": 6, "rate": 0.003}))
    train = keeping_checkpoints(replace(config.train, batch_size=4), every=2)
    run = set_up(replace(config, train=train), tmp_path / "model")
    run.train()
    second = run.folder.checkpoints()[0]
    shutil.copytree(second, second.with_name("step-00000003"))
    return run


def names(run: Training) -> list[str]:
    return [path.name for path in run.folder.checkpoints()]


def test_the_first_checkpoint_of_each_level_and_the_last_stay(
    trained: Training, tmp_path: Path
) -> None:
    scores = iter([0.1, 0.6, 0.4])
    found = course(trained, tmp_path, [0.05, 0.5, 0.9], lambda model: next(scores))
    assert found.by_step == [(2, 0.1), (4, 0.6), (6, 0.4)]  # not of the stop
    assert {level: path.name for level, path in found.first.items()} == {
        0.05: "step-00000002",
        0.5: "step-00000004",
    }
    assert names(trained) == ["step-00000002", "step-00000004", "step-00000006"]

    def loops(model: RecurrentDepthLM) -> dict[str, int]:
        return {"loops": model.config.num_loops}

    assert found.at(0.5, loops) == {"step": 4, "loops": 4}
    assert found.at(0.9, loops) is None


def test_a_kill_between_writing_and_deleting_measures_nothing_twice(
    trained: Training, tmp_path: Path
) -> None:
    scores = iter([0.1, 0.6, 0.7])
    kept = names(trained)
    shutil.copytree(trained.folder.path / "checkpoints", tmp_path / "before")
    first = course(trained, tmp_path, [0.5], lambda model: next(scores))
    shutil.rmtree(trained.folder.path / "checkpoints")
    shutil.move(tmp_path / "before", trained.folder.path / "checkpoints")
    assert (tmp_path / RECORD).is_file() and names(trained) == kept
    again = course(trained, tmp_path, [0.5], lambda model: pytest.fail("scored twice"))
    assert again == first and names(trained) == ["step-00000004", "step-00000006"]


def test_a_table_counts_runs_and_averages_steps() -> None:
    arms = [
        (["a"], [{"step": 40, "x": 1}, None, {"step": 60, "x": 3}]),
        (["b"], [None]),
    ]
    found = table(
        "t",
        ["arm"],
        ["x", "y"],
        arms,
        lambda n, early: [str(len(early)), f"{n[0]}{early[-1]['x']}"],
    )
    assert found.header == ["arm", "reached by", "mean step", "x", "y"]
    assert found.rows == [["a", "2 of 3", "50", "2", "a3"], ["b", "0 of 1", "", "", ""]]
