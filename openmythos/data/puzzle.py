"""What all puzzles share: exact answers, deterministic batches, held-out examples, leak baselines.

A puzzle has examples of several sizes (hops of a walk, factors of a product ...), written as token
ids without special tokens. Its batches are a pure function of seed, step and size, its held-out
examples are chosen by a hash of the whole example, and its leak baselines are the scores of
guessers that do not do the work: a task where one of them is far above chance shows nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt64

from openmythos.config.schema import as_seed, require, to_dict
from openmythos.data.hashing import mix, threshold
from openmythos.data.packing import IGNORED_TARGET, Batch
from openmythos.folder import PUZZLE_FILE, write_json

MIN_TO_HOLD_OUT = 1000  # examples of a size; of fewer, all are trained

# One random stream per purpose, so that two uses of the same seed never share a draw.
TABLE, HELD_OUT, TRAIN, EVAL, GUESS, CHOICE, POSITIONS, ALONE = range(8)


@dataclass(frozen=True, kw_only=True)
class PuzzleConfig:
    """Settings of a puzzle; its seed is given apart, because it is the run's.

    Attributes:
        held_out_fraction: Share of the examples of each size that training never samples.
    """

    kind: ClassVar[str]
    held_out_fraction: float = 0.1

    def __post_init__(self) -> None:
        share = self.held_out_fraction
        allowed = "0 to 0.5, training needs the rest"
        require(0.0 <= share <= 0.5, "held_out_fraction", share, allowed)


class Puzzle(ABC):
    """Batches, held-out examples and leak baselines of one configuration.

    A hash of the whole question decides whether it is held out, so every process and batch size
    agree. Nothing is held out of sizes with fewer than 1,000 examples: those are evaluated on
    training examples.

    Attributes:
        kind: The puzzle's name, as in the names of its evaluation tasks.
        noun: What an example is called.
        size_word: What the size counts.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    size_word: ClassVar[str]
    least_size: ClassVar[int] = 1

    def __init__(self, held_out_fraction: float, seed: int) -> None:
        self.held_out_fraction, self.seed = held_out_fraction, as_seed("seed", seed)

    # --- what a puzzle says of itself -------------------------------------------------------------

    @property
    @abstractmethod
    def words(self) -> Sequence[str]:
        """The word of each token id."""

    @property
    @abstractmethod
    def form(self) -> str:
        """How a question is written, with an example at its end."""

    @property
    @abstractmethod
    def explained(self) -> str:
        """One plain sentence: how a question is written, and what its answer is."""

    @abstractmethod
    def places(self, size: int) -> Sequence[str | None]:
        """What stands at each token of a question; None where no other word could stand."""

    @property
    @abstractmethod
    def kinds(self) -> Sequence[int]:
        """How many words each kind has, in the order of ids: they can stand for each other."""

    @property
    @abstractmethod
    def max_train_size(self) -> int:
        """The largest size of training."""

    @property
    def max_size(self) -> int | None:
        """The largest size that there is; None: any."""
        return None

    @abstractmethod
    def question_len(self, size: int) -> int:
        """Tokens of a question; its answer begins after them."""

    def answer_len(self, question_len: int) -> int:
        """Tokens of the answer to a question of so many tokens: the last targets of a row."""
        return 1

    @abstractmethod
    def num_examples(self, size: int) -> int:
        """Number of different examples of this size."""

    @abstractmethod
    def num_draws(self, size: int) -> int:
        """Random numbers that make an example."""

    @abstractmethod
    def write(self, draws: UInt64[np.ndarray, "B N"], size: int) -> Int[np.ndarray, "B T"]:
        """Examples from random numbers: the input tokens of each."""

    @abstractmethod
    def targets(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The right token after each token; -100 where there is no loss."""

    @abstractmethod
    def leak_baselines(self, size: int) -> dict[str, float]:
        """Share of right answers, at this size, of guessers that do not do the work.

        chance: a uniform guess. majority: the most frequent answer. last_token: the best guess from
        the last word (of a sum: the last number) alone. suffix_only: the best guess from the end of
        the question, as the class says.

        Raises:
            ValueError: The size is out of range.
        """

    def on_the_way(self, questions: Int[np.ndarray, "B T"]) -> dict[str, Int[np.ndarray, " B"]]:
        """The token of each result on the way to the answer, by what it is; none by default."""
        return {}

    def possible(self, tokens: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, " B"]:
        """Which examples have an answer; the others are drawn again."""
        return np.ones(len(tokens), dtype=bool)

    def token_positions(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The positions of the tokens, a function of them."""
        return np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What ``read_puzzle`` makes the same puzzle from, ready for JSON."""

    def save(self, folder: Path) -> None:
        """Write the settings into a checkpoint's folder; ``read_puzzle`` reads them."""
        write_json(folder / PUZZLE_FILE, self.settings)

    # --- what follows from it ---------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.words)

    @property
    def train_sizes(self) -> range:
        """The sizes of training."""
        return range(self.least_size, self.max_train_size + 1)

    def num_tokens(self, size: int) -> int:
        """Input tokens of an example: the question, and the answer but its last token."""
        asked = self.question_len(size)
        return asked + self.answer_len(asked) - 1

    def holds_out(self, size: int) -> bool:
        """Whether some examples of this size are held out."""
        return self.num_examples(size) >= MIN_TO_HOLD_OUT and self.held_out_fraction > 0

    def is_held_out(self, questions: Int[np.ndarray, "B T"], size: int) -> Bool[np.ndarray, " B"]:
        """Which questions of a size are held out from training."""
        if not self.holds_out(size):
            return np.zeros(len(questions), dtype=bool)
        return self.hashes(questions, HELD_OUT) < threshold(self.held_out_fraction)

    def hashes(self, questions: Int[np.ndarray, "B T"], stream: int) -> UInt64[np.ndarray, " B"]:
        """A hash of each question."""
        keys = draw(questions[:, 0], self.seed, stream)
        for column in questions[:, 1:].T:
            keys = mix(keys ^ column.astype(np.uint64), stream)
        return keys

    def sample_batch(
        self, step: int, size: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """Rows ``rank::world_size`` of the global training batch of ``step``: a pure function.

        Examples are drawn uniformly from those that are not held out; sizes beyond those of
        training will do.

        Raises:
            ValueError: A number is out of range.
        """
        self.check(size, batch_size)
        if step < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"step={step}, rank={rank} of world_size={world_size}: give step >= 0 and "
                f"0 <= rank < world_size"
            )
        rows = np.arange(rank, batch_size, world_size, dtype=np.int64)
        return self._batch(rows, size, TRAIN, step, held_out=False)

    def held_out_batch(self, size: int, count: int, seed: int = 0) -> Batch:
        """``count`` held-out examples, with replacement; training ones if none is held out.

        Raises:
            ValueError: A number is out of range.
        """
        self.check(size, count)
        rows = np.arange(count, dtype=np.int64)
        return self._batch(rows, size, EVAL, seed, held_out=self.holds_out(size))

    def in_words(self, size: int) -> str:
        """Examples of a size in words: walks of 1 hop."""
        word = self.size_word.removesuffix("s") if size == 1 else self.size_word
        return f"{self.noun}s of {size} {word}"

    def check(self, size: int, count: int = 1) -> None:
        """Check that there are examples of this size.

        Raises:
            ValueError: A number is out of range.
        """
        most = "" if self.max_size is None else f" to {self.max_size}"
        too_large = self.max_size is not None and size > self.max_size
        if size < self.least_size or too_large or count < 1:
            raise ValueError(
                f"num_{self.size_word}={size}, examples={count}: give {self.size_word} of at least "
                f"{self.least_size}{most}, and at least 1 example"
            )

    def _batch(
        self, rows: Int[np.ndarray, " B"], size: int, stream: int, step: int, held_out: bool
    ) -> Batch:
        tokens = self._written(rows, size, 0, stream, step)
        attempt = 0
        while (wrong := self._wrong(tokens, size, held_out)).any():
            attempt += 1
            tokens[wrong] = self._written(rows[wrong], size, attempt, stream, step)
        inputs = torch.from_numpy(tokens)
        return Batch(
            tokens=inputs,
            targets=torch.from_numpy(self.targets(tokens)),
            documents=torch.zeros_like(inputs),
            positions=torch.from_numpy(self.token_positions(tokens)),
            num_bytes=0,
        )

    def _wrong(
        self, tokens: Int[np.ndarray, "B T"], size: int, held_out: bool
    ) -> Bool[np.ndarray, " B"]:
        questions = tokens[:, : self.question_len(size)]
        return (self.is_held_out(questions, size) != held_out) | ~self.possible(tokens)

    def _written(
        self, rows: Int[np.ndarray, " B"], size: int, attempt: int, stream: int, step: int
    ) -> Int[np.ndarray, "B T"]:
        count = self.num_draws(size)
        cells = rows[:, None] * count + np.arange(count)
        return self.write(draw(cells, self.seed, stream, step, size, attempt), size)


class SeededPuzzle(Puzzle):
    """A puzzle whose configuration leaves the seed to the run.

    Attributes:
        config: Its settings.
    """

    config: PuzzleConfig

    def __init__(self, config: PuzzleConfig, seed: int) -> None:
        super().__init__(config.held_out_fraction, seed)
        self.config = config

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Puzzle``."""
        return {**to_dict(self.config), "seed": self.seed}


def last_only(
    tokens: Int[np.ndarray, "B T"], answers: Int[np.ndarray, " B"]
) -> Int[np.ndarray, "B T"]:
    """Targets of examples whose answer is one token, after the last one."""
    targets = np.full_like(tokens, IGNORED_TARGET)
    targets[:, -1] = answers
    return targets


def choose_size(sizes: range, seed: int, step: int) -> int:
    """The size of the batch of ``step``: each as likely."""
    return sizes[int(below(draw(np.arange(1), seed, CHOICE, step), len(sizes))[0])]


def draw(values: Int[np.ndarray, "..."], *seeds: int) -> UInt64[np.ndarray, "..."]:
    """Uniform 64-bit numbers, one for each value, that depend on all of ``seeds``."""
    draws = values.astype(np.uint64)
    for seed in seeds:
        draws = mix(draws, seed)
    return draws


def below(draws: UInt64[np.ndarray, "..."], bound: int) -> Int[np.ndarray, "..."]:
    """Uniform numbers in 0 .. bound - 1."""
    return (draws % np.uint64(bound)).astype(np.int64)
