import itertools
import threading
from pathlib import Path

import pytest
import torch

from openmythos.data.induction import Induction, InductionConfig
from openmythos.data.prepare import prepare
from openmythos.data.synthetic import Curriculum
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.recipe import TrainConfig
from openmythos.train.task import PuzzleTask, Task, TextTask
from openmythos.train.validation import held_out_bits_per_byte, puzzle_accuracy
from tests.strategies import random_model
from tests.train.examples import loader, oracle, small_walks, tiny_model, write_text


def tokens_of(task: Task, start: int, batch_size: int, count: int) -> list[torch.Tensor]:
    batches = task.batches(start, batch_size)
    return [batch.tokens for batch in itertools.islice(batches, count)]


# --- text ----------------------------------------------------------------------------------------


def test_text_task(prepared: Path) -> None:
    task = TextTask(loader(prepared, "train"), loader(prepared))
    assert isinstance(task, Task)
    first, again = (tokens_of(task, 3, 4, 2) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert torch.equal(first[1], tokens_of(task, 4, 4, 1)[0])
    assert not torch.equal(first[0], first[1])
    with pytest.raises(ValueError, match="batch_size 5 differs"):
        task.batches(0, 5)
    model = random_model(tiny_model())
    config = TrainConfig(max_steps=1, eval_loops=(1, 4), eval_batches=2)
    rows = task.evaluate(model, config)
    assert [row["num_loops"] for row in rows] == [1, 4]
    assert rows[1]["bits_per_byte"] == held_out_bits_per_byte(model, loader(prepared), 4, 2)
    assert task.after_step(model, 1) == {}


def test_a_thread_reads_ahead_until_the_batches_are_closed(prepared: Path) -> None:
    def readers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("token-loader")]

    batches = TextTask(loader(prepared, "train"), loader(prepared)).batches(0, 4)
    assert not readers()
    next(batches)
    assert len(readers()) == 1
    batches.close()
    assert not readers()


def test_text_task_refuses_a_checkpoint_of_other_data(prepared: Path, tmp_path: Path) -> None:
    task = TextTask(loader(prepared, "train"), loader(prepared))
    TextTask(loader(prepared, "train"), loader(prepared)).load_state_dict(task.state_dict())
    prepare(str(write_text(tmp_path, 60)), tmp_path / "data", tokenizer=byte_tokenizer())
    other = TextTask(loader(tmp_path / "data", "train"), loader(tmp_path / "data"))
    with pytest.raises(ValueError, match="training data has changed"):
        other.load_state_dict(task.state_dict())


# --- hops ----------------------------------------------------------------------------------------


def test_the_curriculum_moves_on_when_the_stage_is_learnt() -> None:
    walks = small_walks()
    task = PuzzleTask(walks, Curriculum(max_stage=4), check_loops=1, seed=0)
    assert isinstance(task, Task)
    every = task.check_every
    lost, good = oracle(walks, right=False), oracle(walks, right=True)
    assert task.after_step(lost, every) == {"stage": 1.0}
    assert task.after_step(good, every + 1) == {"stage": 1.0}  # not a step that checks
    stages = [task.after_step(good, n * every)["stage"] for n in range(2, 8)]
    assert stages == [2.0, 3.0, 4.0, 4.0, 4.0, 4.0]
    lengths = {tokens.shape[1] - 1 for tokens in tokens_of(task, 0, 4, 60)}
    assert lengths == {1, 2, 3, 4}
    again = PuzzleTask(walks, Curriculum(max_stage=4), check_loops=1, seed=0)
    again.load_state_dict(task.state_dict())
    assert all(map(torch.equal, tokens_of(again, 0, 4, 5), tokens_of(task, 0, 4, 5)))
    rows = task.evaluate(good, TrainConfig(max_steps=1, eval_loops=(1, 2)))
    assert rows == [
        {"num_loops": 1, "num_hops": 4, "accuracy": 1.0},
        {"num_loops": 2, "num_hops": 4, "accuracy": 1.0},
    ]


def test_a_trained_model_begins_where_it_stands() -> None:
    walks = small_walks()
    task = PuzzleTask(walks, Curriculum(max_stage=4), check_loops=1, seed=0)
    task.before_first_step(oracle(walks, right=False))
    assert task.curriculum.stage == 1
    some = oracle(walks, right=True)
    some.hops = range(2, 3)  # those of one hop are stepped past
    task.before_first_step(some)
    assert task.curriculum.stage == 3
    task.before_first_step(oracle(walks, right=True))
    assert task.curriculum.stage == 4


def test_a_walk_is_drawn_when_it_is_asked_for() -> None:
    """Of the stage that the step before has reached."""
    task = PuzzleTask(small_walks(), Curriculum(max_stage=4), check_loops=1, seed=0)
    batches = task.batches(0, 4)
    for stage in (1, 2, 4):
        task.curriculum.stage = stage
        longest = max(next(batches).tokens.shape[1] - 1 for _ in range(20))
        assert longest == stage


def test_leaks_are_those_of_the_longest_walks() -> None:
    task = PuzzleTask(small_walks(), Curriculum(max_stage=4), check_loops=1, seed=0)
    said = task.leaks_in_words()
    assert said.startswith("leak baselines at 4 hops: chance 0.125, majority 0.125, last token")


def test_a_puzzle_without_a_curriculum_trains_all_its_sizes() -> None:
    puzzle = Induction(InductionConfig(length=9, max_train_hops=3), seed=2)
    task = PuzzleTask(puzzle, None, check_loops=1, seed=2)
    assert isinstance(task, Task)
    hops = {int(tokens[0, 0]) for tokens in tokens_of(task, 0, 4, 30)}
    assert hops == {4, 5, 6}  # ids of hop1 to hop3
    assert all(map(torch.equal, tokens_of(task, 3, 4, 2), tokens_of(task, 3, 4, 2)))
    model = random_model(tiny_model())
    assert task.after_step(model, 25) == {} == task.state_dict()
    task.load_state_dict({})
    (row,) = task.evaluate(model, TrainConfig(max_steps=1, eval_loops=(2,)))
    expected = puzzle_accuracy(model, puzzle, 3, 2, 512, 0)
    assert row == {"num_loops": 2, "num_hops": 3, "accuracy": expected}
    assert task.leaks_in_words().startswith("leak baselines at 3 hops: chance 0.250")


def test_walks_with_passed_targets_are_evaluated_on_their_answer() -> None:
    walks = small_walks()
    task = PuzzleTask(walks, Curriculum(max_stage=4, stage=4), 1, seed=0, passed_targets=True)
    batch = next(task.batches(0, 8))
    assert (batch.targets >= 0).all()
    assert task.after_step(oracle(walks, right=True), task.check_every) == {"stage": 4.0}
