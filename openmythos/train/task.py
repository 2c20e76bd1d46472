"""What a run trains on: packed text, or walks whose difficulty is known."""

import itertools
from collections.abc import Generator
from typing import Any, Protocol, runtime_checkable

from openmythos.data.loader import TokenLoader
from openmythos.data.packing import Batch
from openmythos.data.synthetic import Curriculum, Walks
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.recipe import TrainConfig
from openmythos.train.validation import Row, held_out_bits_per_byte, hops_accuracy

Batches = Generator[Batch, None, None]  # without an end; closing it stops what reads ahead


@runtime_checkable  # the tests check arguments
class Task(Protocol):
    """Batches, evaluation, and state that a checkpoint keeps."""

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """The batches from a step on.

        Each is a pure function of the seed, its step and ``state_dict`` when it is asked for.
        """

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Let the task move on, for example to harder examples; returns numbers to record."""

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Held-out results, one row per number of loops."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            ValueError: The state is of another task.
        """


class TextTask:
    """Next-token prediction on prepared token shards."""

    def __init__(self, train: TokenLoader, validation: TokenLoader) -> None:
        self.train, self.validation = train, validation

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """See ``Task``; a thread of the loader's reads ahead, and the loader knows its batch size.

        Raises:
            ValueError: ``batch_size`` is not the loader's.
        """
        if batch_size != self.train.batch_size:
            raise ValueError(f"batch_size {batch_size} differs from the loader's")
        return self.train.iterate(start_step)

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


class HopsTask:
    """Walks of growing length: stage k trains up to k hops until held-out accuracy passes."""

    check_every = 25
    check_size = 512

    def __init__(self, walks: Walks, curriculum: Curriculum, check_loops: int, seed: int) -> None:
        self.walks, self.curriculum = walks, curriculum
        self.check_loops, self.seed = check_loops, seed

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """Walks of one length per batch; none is read ahead, the stage may change before it."""
        for step in itertools.count(start_step):
            num_hops = self.curriculum.choose_hops(self.seed, step)
            yield self.walks.sample_batch(step, num_hops, batch_size)

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Every ``check_every`` steps: pass to the next stage if the current one is learnt."""
        stage = self.curriculum.stage
        if step % self.check_every == 0 and stage < self.curriculum.max_stage:
            accuracy = hops_accuracy(
                model, self.walks, stage, self.check_loops, self.check_size, seed=step
            )
            self.curriculum.observe(accuracy)
        return {"stage": float(self.curriculum.stage)}

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Accuracy on the longest trained walks, by loops."""
        hops = self.walks.config.max_train_hops
        rows: list[Row] = []
        for num_loops in config.eval_loops:
            accuracy = hops_accuracy(model, self.walks, hops, num_loops, self.check_size, seed=0)
            rows.append({"num_loops": num_loops, "num_hops": hops, "accuracy": accuracy})
        return rows

    def leaks_in_words(self) -> str:
        """What guessers reach on the longest trained walks without following them."""
        hardest = self.walks.config.max_train_hops
        guesses = self.walks.leak_baselines(hardest).items()
        shown = ", ".join(f"{name.replace('_', ' ')} {share:.3f}" for name, share in guesses)
        return f"leak baselines at {hardest} hops: {shown}"

    def state_dict(self) -> dict[str, Any]:
        """The curriculum's stage."""
        return self.curriculum.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.curriculum.load_state_dict(state)
