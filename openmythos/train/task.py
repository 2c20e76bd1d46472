"""What a run trains on: packed text, or puzzles whose difficulty is known."""

import itertools
import operator
from collections.abc import Generator, Sequence
from typing import Any, Protocol, runtime_checkable

from openmythos.data.loader import TokenLoader, read_ahead
from openmythos.data.mixture import MixtureLoader
from openmythos.data.packing import Batch
from openmythos.data.puzzle import Puzzle, choose_size
from openmythos.data.synthetic import Curriculum, Walks
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.ranks import Ranks
from openmythos.train.recipe import TrainConfig
from openmythos.train.validation import Row, held_out_bits_per_byte, puzzle_accuracy

Batches = Generator[Batch, None, None]  # endless; closing it stops the thread that prefetches


@runtime_checkable  # the tests check argument types
class Task(Protocol):
    """Supplies the batches, the evaluation, and the state that a checkpoint keeps of them."""

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """Endless batches of ``batch_size`` rows, beginning with that of ``start_step``.

        Over ranks each has this one's rows of a batch: r, r + n, r + 2n ... of n ranks. Each is a
        pure function of the seed, its step, and ``state_dict`` at the time it is drawn.
        """

    def before_first_step(self, model: RecurrentDepthLM) -> None:
        """Called once, with weights that were trained before: begin where they stand."""

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
    """Next-token prediction on prepared token shards, measured on held-out ones, if any.

    ``validation`` is the first loader that has something held out. Over ranks, the loaders are this
    one's.
    """

    def __init__(
        self,
        train: TokenLoader | MixtureLoader,
        validation: TokenLoader | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.train, self.validation, self.ranks = train, validation, ranks

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """See ``Task``; the loader's thread prefetches.

        Raises:
            ValueError: ``batch_size`` is not the loader's.
        """
        if batch_size != self.train.batch_size:
            raise ValueError(f"batch_size {batch_size} differs from the loader's")
        return read_ahead(self.train, start_step)

    def before_first_step(self, model: RecurrentDepthLM) -> None:
        """Nothing to do: text does not get harder."""

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Nothing to do: text does not get harder."""
        return {}

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Held-out bits per byte, by number of loops; no rows if no text is held out."""
        rows: list[Row] = []
        if self.validation is None:
            return rows
        for num_loops in config.eval_loops:
            bits = held_out_bits_per_byte(
                model, self.validation, num_loops, config.eval_batches, self.ranks
            )
            rows.append({"num_loops": num_loops, "bits_per_byte": bits})
        return rows

    def in_words(self) -> list[str]:
        """What the data holds of its source, and what it does not; a line per source."""
        if isinstance(self.train, MixtureLoader):
            return self.train.in_words()
        cut = self.train.cut_in_words()
        return [self.train.data.summary(), *([cut] if cut else [])]

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


class MixtureTask(TextTask):
    """Text of several sources, each measured on what is held out of it, if anything is.

    Args:
        train: Loader of the mixture.
        held_out: The name, the weight and the validation loader of each source that has one.
    """

    def __init__(
        self,
        train: MixtureLoader,
        held_out: Sequence[tuple[str, float, TokenLoader]],
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(train, held_out[0][2] if held_out else None, ranks)
        self.held_out = held_out

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Held-out bits per byte of each source, and their mean by weight, by number of loops."""
        rows: list[Row] = []
        for num_loops in config.eval_loops if self.held_out else ():
            bits = [
                held_out_bits_per_byte(model, loader, num_loops, config.eval_batches, self.ranks)
                for _, _, loader in self.held_out
            ]
            weights = [weight for _, weight, _ in self.held_out]
            mean = sum(map(operator.mul, weights, bits)) / sum(weights)
            names = [f"bits_per_byte of {name}" for name, _, _ in self.held_out]
            by_source = dict(zip(names, bits, strict=True))
            rows.append({"num_loops": num_loops, "bits_per_byte": mean, **by_source})
        return rows


class PuzzleTask:
    """Puzzles of all sizes of the training alike, or of growing size.

    With a curriculum, stage k trains up to size k until its held-out accuracy is reached.
    """

    check_every = 25
    check_count = 512

    def __init__(
        self,
        puzzle: Puzzle,
        curriculum: Curriculum | None,
        check_loops: int,
        seed: int,
        passed_targets: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        if passed_targets and not isinstance(puzzle, Walks):
            raise ValueError(f"passed_targets is for walks; the puzzle is {puzzle.kind}")
        self.puzzle, self.curriculum = puzzle, curriculum
        self.check_loops, self.seed = check_loops, seed
        self.passed_targets = passed_targets
        self.ranks = Ranks.alone() if ranks is None else ranks

    def batches(self, start_step: int, batch_size: int) -> Batches:
        """Examples of one size per batch; not prefetched, because the stage may change."""
        sizes = self.puzzle.train_sizes
        for step in itertools.count(start_step):
            if self.curriculum is None:
                size = choose_size(sizes, self.seed, step)
            else:
                size = self.curriculum.choose_hops(self.seed, step)
            batch = self.puzzle.sample_batch(step, size, batch_size)
            if self.passed_targets and isinstance(self.puzzle, Walks):
                batch = self.puzzle.with_passed_targets(batch)
            yield batch.rows(self.ranks.row_rank, batch_size, self.ranks.num_row_ranks)

    def before_first_step(self, model: RecurrentDepthLM) -> None:
        """Go on after the last stage that is learnt: to train only earlier ones unlearns it.

        Asked from the end, because a model that was trained on the longest walks only may step
        past the answers of shorter ones.
        """
        if self.curriculum is None:
            return
        for stage in range(self.curriculum.max_stage, self.curriculum.stage, -1):
            if self._accuracy(model, stage, 0) >= self.curriculum.threshold:
                self.curriculum.stage = min(stage + 1, self.curriculum.max_stage)
                return

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        """Every ``check_every`` steps, go on to the next stage if the current one is learnt."""
        if self.curriculum is None:
            return {}
        stage = self.curriculum.stage
        if step % self.check_every == 0 and stage < self.curriculum.max_stage:
            self.curriculum.observe(self._accuracy(model, stage, step))
        return {"stage": float(self.curriculum.stage)}

    def _accuracy(self, model: RecurrentDepthLM, size: int, seed: int) -> float:
        """Held-out accuracy on a size at the loops that decide whether it is learnt."""
        loops, count = self.check_loops, self.check_count
        return puzzle_accuracy(model, self.puzzle, size, loops, count, seed, self.ranks)

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Row]:
        """Held-out accuracy on the largest size of training, by number of loops."""
        size, name = self.puzzle.max_train_size, f"num_{self.puzzle.size_word}"
        rows: list[Row] = []
        for num_loops in config.eval_loops:
            accuracy = puzzle_accuracy(
                model, self.puzzle, size, num_loops, self.check_count, 0, self.ranks
            )
            rows.append({"num_loops": num_loops, name: size, "accuracy": accuracy})
        return rows

    def leaks_in_words(self) -> str:
        """The leak baselines at the largest size of training, as a sentence."""
        largest = self.puzzle.max_train_size
        guesses = self.puzzle.leak_baselines(largest).items()
        shown = ", ".join(f"{name.replace('_', ' ')} {share:.3f}" for name, share in guesses)
        return f"leak baselines at {largest} {self.puzzle.size_word}: {shown}"

    def state_dict(self) -> dict[str, Any]:
        """The curriculum's stage, if there is one; beyond it, batches depend on the step only."""
        return {} if self.curriculum is None else self.curriculum.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state)
