"""What a run trains on: packed text, or walks whose difficulty is known."""

import math
from typing import Any, Protocol, runtime_checkable

import torch

from openmythos.data.loader import TokenLoader
from openmythos.data.packing import Batch
from openmythos.data.synthetic import Curriculum, HopsTask
from openmythos.model.context import ForwardContext
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cross_entropy import cross_entropy
from openmythos.train.recipe import TrainConfig

Row = dict[str, float | int | str]


@runtime_checkable  # the tests check arguments
class Task(Protocol):
    """Batches, evaluation, and state that a checkpoint keeps."""

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of a step: a pure function of the seed, the step and ``state_dict``."""

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Let the task move on, for example to harder examples; returns numbers to record."""

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Held-out results, one row a number of loops."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            ValueError: The state is of another task.
        """


def on_device(model: RecurrentDepthLM, batch: Batch) -> tuple[Batch, ForwardContext]:
    """A batch where the model is, and its context; rows of one whole document need no mask."""
    documents = batch.documents
    # Asked before the batch moves: the answer must not wait for the device.
    single = bool((documents == documents[:, :1]).all()) and bool((documents >= 0).all())
    batch = batch.to(model.embed.weight.device)
    masked = None if single else batch.documents
    return batch, model.context(batch.tokens, documents=masked, positions=batch.positions)


def held_out_bits_per_byte(
    model: RecurrentDepthLM, loader: TokenLoader, num_loops: int, max_batches: int | None = None
) -> float:
    """Bits per byte of the validation text at a fixed depth.

    Every token of the split counts once; ``max_batches`` bounds the work to the first batches.
    """
    nats, num_bytes = 0.0, 0
    with inference(model):
        for batch in loader.validation_batches(max_batches):
            batch, ctx = on_device(model, batch)
            generator = torch.Generator().manual_seed(0)
            output = model(batch.tokens, num_loops=num_loops, ctx=ctx, generator=generator)
            nats += float(cross_entropy(output.logits, batch.targets).sum())
            num_bytes += batch.num_bytes
    return nats / math.log(2) / num_bytes


class TextTask:
    """Next-token prediction on prepared token shards."""

    def __init__(self, train: TokenLoader, validation: TokenLoader) -> None:
        self.train, self.validation = train, validation

    def batch(self, step: int, batch_size: int) -> Batch:
        """See ``Task``; the loader knows its batch size."""
        if batch_size != self.train.batch_size:
            raise ValueError(f"batch_size {batch_size} differs from the loader's")
        return self.train.batch(step)

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Text does not get harder."""
        return {}

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Bits per byte by loops."""
        rows: list[Row] = []
        for num_loops in config.eval_loops:
            bits = held_out_bits_per_byte(model, self.validation, num_loops, config.eval_batches)
            rows.append({"num_loops": num_loops, "bits_per_byte": bits})
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Batches depend on the step alone, and on the data, which is named."""
        return {"data": self.train.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Task``."""
        if state.get("data") != self.train.fingerprint:
            raise ValueError(
                "the training data has changed since the checkpoint was written; restore it, or "
                "choose another --out"
            )


def hops_accuracy(
    model: RecurrentDepthLM, task: HopsTask, num_hops: int, num_loops: int, size: int, seed: int
) -> float:
    """Share of held-out walks of ``num_hops`` hops whose target is the most likely token."""
    batch = task.held_out_batch(num_hops, size, seed).to(model.embed.weight.device)
    generator = torch.Generator().manual_seed(0)
    with inference(model):
        logits = model(batch.tokens, num_loops=num_loops, generator=generator).logits[:, -1]
    return float((logits.argmax(dim=-1) == batch.targets[:, -1]).float().mean())


class HopsTraining:
    """Walks of growing length: stage k trains up to k hops until held-out accuracy passes."""

    check_every = 25
    check_size = 512

    def __init__(self, task: HopsTask, curriculum: Curriculum, check_loops: int, seed: int) -> None:
        self.task, self.curriculum = task, curriculum
        self.check_loops, self.seed = check_loops, seed

    def batch(self, step: int, batch_size: int) -> Batch:
        """Walks of one length a batch."""
        num_hops = self.curriculum.choose_hops(self.seed, step)
        return self.task.sample_batch(step, num_hops, batch_size)

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Every ``check_every`` steps: pass to the next stage if the current one is learnt."""
        stage = self.curriculum.stage
        if step % self.check_every == 0 and stage < self.curriculum.max_stage:
            accuracy = hops_accuracy(
                model, self.task, stage, self.check_loops, self.check_size, seed=step
            )
            self.curriculum.observe(accuracy)
        return {"stage": float(self.curriculum.stage)}

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Accuracy on the longest trained walks, by loops."""
        hops = self.task.config.max_train_hops
        rows: list[Row] = []
        for num_loops in config.eval_loops:
            accuracy = hops_accuracy(model, self.task, hops, num_loops, self.check_size, seed=0)
            rows.append({"num_loops": num_loops, "num_hops": hops, "accuracy": accuracy})
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The curriculum's stage."""
        return self.curriculum.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.curriculum.load_state_dict(state)
