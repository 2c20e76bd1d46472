import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from openmythos.data.loader import TokenLoader
from openmythos.data.prepare import prepare
from openmythos.data.synthetic import Curriculum, HopsConfig, HopsTask
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.recipe import TrainConfig
from openmythos.train.task import (
    HopsTraining,
    Task,
    TextTask,
    held_out_bits_per_byte,
    hops_accuracy,
    on_device,
)
from tests.strategies import random_model, seeded
from tests.train.examples import tiny_model, write_text

SEQ_LEN = 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    prepare(str(write_text(folder)), folder / "data", tokenizer=byte_tokenizer())
    return folder / "data"


def loader(folder: Path, split: str = "val", batch_size: int = 4) -> TokenLoader:
    return TokenLoader(folder, split, seq_len=SEQ_LEN, batch_size=batch_size)


# --- held-out text -------------------------------------------------------------------------------


def test_bits_per_byte_by_hand(prepared: Path) -> None:
    model = random_model(tiny_model(max_seq_len=SEQ_LEN)).train()
    bits = held_out_bits_per_byte(model, loader(prepared), 2)
    assert model.training
    nats, num_bytes = 0.0, 0
    for batch in loader(prepared, batch_size=1).validation_batches():
        documents, targets = batch.documents[0], batch.targets[0]
        for number in documents[documents >= 0].unique():
            chosen = documents == number
            logits = model.eval()(batch.tokens[:, chosen], num_loops=2).logits[0]
            nats += float(
                functional.cross_entropy(logits, targets[chosen], reduction="sum").detach()
            )
        num_bytes += int((targets >= 3).sum())  # ids of the byte tokenizer: 3 + byte
    split = loader(prepared)
    assert num_bytes == split.num_bytes
    assert bits == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_bits_per_byte_does_not_depend_on_the_batch(prepared: Path) -> None:
    model = random_model(tiny_model())
    values = [held_out_bits_per_byte(model, loader(prepared, batch_size=b), 3) for b in (1, 5, 16)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    first = held_out_bits_per_byte(model, loader(prepared), 3, max_batches=1)
    assert first != pytest.approx(values[0], rel=1e-4)


def test_an_untrained_model_knows_nothing(prepared: Path) -> None:
    model = RecurrentDepthLM(tiny_model(), seeded())
    split = loader(prepared)
    targets = sum(int((b.targets >= 0).sum()) for b in split.validation_batches())
    guess = math.log2(300) * targets / split.num_bytes
    # A little above: its logits are small and random, not equal.
    assert guess <= held_out_bits_per_byte(model, split, 1) < 1.1 * guess


def test_rows_of_one_document_need_no_mask(prepared: Path) -> None:
    model = random_model(tiny_model())
    batches = list(loader(prepared, batch_size=1).validation_batches())
    masks = [on_device(model, batch)[1].mask for batch in batches]
    single = [len(b.documents.unique()) == 1 and b.documents.min() >= 0 for b in batches]
    assert any(single) and not all(single)
    assert [mask is None for mask in masks] == single


# --- text ----------------------------------------------------------------------------------------


def test_text_task(prepared: Path) -> None:
    task = TextTask(loader(prepared, "train"), loader(prepared))
    assert isinstance(task, Task)
    assert torch.equal(task.batch(3, 4).tokens, task.batch(3, 4).tokens)
    assert not torch.equal(task.batch(3, 4).tokens, task.batch(4, 4).tokens)
    with pytest.raises(ValueError, match="batch_size 5 differs"):
        task.batch(0, 5)
    model = random_model(tiny_model())
    config = TrainConfig(max_steps=1, eval_loops=(1, 4), eval_batches=2)
    rows = task.evaluate(model, config)
    assert [row["num_loops"] for row in rows] == [1, 4]
    assert rows[1]["bits_per_byte"] == held_out_bits_per_byte(model, loader(prepared), 4, 2)
    assert task.after_step(model, 1) == {}


def test_text_task_refuses_a_checkpoint_of_other_data(prepared: Path, tmp_path: Path) -> None:
    task = TextTask(loader(prepared, "train"), loader(prepared))
    TextTask(loader(prepared, "train"), loader(prepared)).load_state_dict(task.state_dict())
    prepare(str(write_text(tmp_path, 60)), tmp_path / "data", tokenizer=byte_tokenizer())
    other = TextTask(loader(tmp_path / "data", "train"), loader(tmp_path / "data"))
    with pytest.raises(ValueError, match="training data has changed"):
        other.load_state_dict(task.state_dict())


# --- hops ----------------------------------------------------------------------------------------


def hops_task(**changes: int) -> HopsTask:
    return HopsTask(HopsConfig(num_entities=8, num_relations=2, max_train_hops=4, **changes))


class Oracle(RecurrentDepthLM):
    """Answers right, or with a fixed entity, whatever the weights say."""

    task: HopsTask
    right: bool = True

    def forward(self, tokens: torch.Tensor, **options: object) -> object:  # type: ignore[override]
        output = super().forward(tokens, num_loops=1)
        answers = torch.from_numpy(self.task.entities_along(tokens.numpy()))[:, -1]
        if not self.right:
            answers = torch.zeros_like(answers)
        output.logits[:, -1] = functional.one_hot(answers, output.logits.shape[-1]).float()
        return output


def oracle(task: HopsTask, *, right: bool) -> Oracle:
    model = Oracle(tiny_model(), seeded())
    model.task, model.right = task, right
    return model.train()


def test_hops_accuracy_counts_right_answers() -> None:
    task = hops_task()
    assert hops_accuracy(model := oracle(task, right=True), task, 6, 1, 128, 0) == 1.0
    assert model.training
    wrong = hops_accuracy(oracle(task, right=False), task, 6, 1, 512, 0)
    expected = (task.held_out_batch(6, 512, 0).targets[:, -1] == 0).float().mean()
    assert 0 < wrong < 0.3 and wrong == pytest.approx(float(expected))


def test_the_curriculum_moves_on_when_the_stage_is_learnt() -> None:
    task = hops_task()
    training = HopsTraining(task, Curriculum(max_stage=4), check_loops=1, seed=0)
    assert isinstance(training, Task)
    every = training.check_every
    lost, good = oracle(task, right=False), oracle(task, right=True)
    assert training.after_step(lost, every) == {"stage": 1.0}
    assert training.after_step(good, every + 1) == {"stage": 1.0}  # not a step that checks
    stages = [training.after_step(good, n * every)["stage"] for n in range(2, 8)]
    assert stages == [2.0, 3.0, 4.0, 4.0, 4.0, 4.0]
    lengths = {training.batch(step, 4).tokens.shape[1] - 1 for step in range(60)}
    assert lengths == {1, 2, 3, 4}
    again = HopsTraining(task, Curriculum(max_stage=4), check_loops=1, seed=0)
    again.load_state_dict(training.state_dict())
    assert all(
        torch.equal(again.batch(step, 4).tokens, training.batch(step, 4).tokens)
        for step in range(5)
    )
    rows = training.evaluate(good, TrainConfig(max_steps=1, eval_loops=(1, 2)))
    assert rows == [
        {"num_loops": 1, "num_hops": 4, "accuracy": 1.0},
        {"num_loops": 2, "num_hops": 4, "accuracy": 1.0},
    ]
