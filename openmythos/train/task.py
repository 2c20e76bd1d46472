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

Batches = Generator[Batch, None, None]  # endless; closing it stops the thread that prefetches


@runtime_checkable  # the tests check argument types
class Task(Protocol):
    """Supplies the batches, the evaluation, and the state that a checkpoint keeps of them."""

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """Endless batches, beginning with that of ``start_step``.

        Each is a pure function of the seed, its step, and ``state_dict`` at the time it is drawn.
        """

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Called after every step, for example to go on to harder examples; returns metrics."""

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Held-out results, one row per number of loops."""

    def state_dict(self) -> dict[str, Any]:
        """The JSON-ready state that a checkpoint keeps."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            ValueError: The state does not belong to this task.
        """


class TextTask:
    """Next-token prediction on prepared token shards, measured on held-out ones, if any."""

    def __init__(self, train: TokenLoader, validation: TokenLoader | None) -> None:
        self.train, self.validation = train, validation

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """See ``Task``; the loader's thread prefetches.

        Raises:
            ValueError: ``batch_size`` is not the loader's.
        """
        if batch_size != self.train.batch_size:
            raise ValueError(f"batch_size {batch_size} differs from the loader's")
        return self.train.iterate(start_step)

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Nothing to do: text does not get harder."""
        return {}

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Held-out bits per byte, by number of loops; no rows if no text is held out."""
        rows: list[Row] = []
        if self.validation is None:
            return rows
        for num_loops in config.eval_loops:
            bits = held_out_bits_per_byte(model, self.validation, num_loops, config.eval_batches)
            rows.append({"num_loops": num_loops, "bits_per_byte": bits})
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The fingerprint of the data; beyond it, batches depend on the step only."""
        return {"data": self.train.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Task``."""
        if state.get("data") != self.train.fingerprint:
            raise ValueError(
                "the training data has changed since the checkpoint was written; restore it, or "
                "choose another --out"
            )


class HopsTask:
    """Walks of growing length: stage k trains up to k hops until held-out accuracy is reached."""

    check_every = 25
    check_size = 512

    def __init__(
        self,
        walks: Walks,
        curriculum: Curriculum,
        check_loops: int,
        seed: int,
        passed_targets: bool = False,
    ) -> None:
        self.walks, self.curriculum = walks, curriculum
        self.check_loops, self.seed = check_loops, seed
        self.passed_targets = passed_targets

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """Walks of one length per batch; not prefetched, because the stage may change."""
        for step in itertools.count(start_step):
            num_hops = self.curriculum.choose_hops(self.seed, step)
            batch = self.walks.sample_batch(step, num_hops, batch_size)
            yield self.walks.with_passed_targets(batch) if self.passed_targets else batch

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Every ``check_every`` steps, go on to the next stage if the current one is learnt."""
        stage = self.curriculum.stage
        if step % self.check_every == 0 and stage < self.curriculum.max_stage:
            accuracy = hops_accuracy(
                model, self.walks, stage, self.check_loops, self.check_size, seed=step
            )
            self.curriculum.observe(accuracy)
        return {"stage": float(self.curriculum.stage)}

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Held-out accuracy on walks of ``max_train_hops`` hops, by number of loops."""
        hops = self.walks.config.max_train_hops
        rows: list[Row] = []
        for num_loops in config.eval_loops:
            accuracy = hops_accuracy(model, self.walks, hops, num_loops, self.check_size, seed=0)
            rows.append({"num_loops": num_loops, "num_hops": hops, "accuracy": accuracy})
        return rows

    def leaks_in_words(self) -> str:
        """The leak baselines on walks of ``max_train_hops`` hops, as a sentence."""
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
