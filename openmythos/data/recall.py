"""Recall of values by their keys: from the text before (recall) or from the weights (facts).

    <key 1> <value 1> ... <key n> <value n> <key>   ->   its value           recall
    <subject> <relation>                            ->   its value           facts

The pairs of ``recall`` are new in every row; those of ``facts`` are one table for the whole run,
which a model must store.

Source: "Zoology" (2312.04927), associative recall; "Physics of Language Models" 3.3 (2404.05405),
facts as a measure of what the parameters store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int, UInt64

from openmythos.config.schema import require, require_positive
from openmythos.data.puzzle import TABLE, PuzzleConfig, SeededPuzzle, below, draw, last_only


@dataclass(frozen=True, kw_only=True)
class RecallConfig(PuzzleConfig):
    """Settings of recall from the text before.

    Attributes:
        num_keys: Different keys; no row has one twice.
        num_values: Different values; chance is 1 / num_values.
        max_train_pairs: Most pairs of a training row.
    """

    kind: ClassVar[str] = "recall"
    num_keys: int = 16
    num_values: int = 16
    max_train_pairs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_keys", "num_values", "max_train_pairs")
        fits = self.max_train_pairs <= self.num_keys
        allowed = f"at most num_keys={self.num_keys}"
        require(fits, "max_train_pairs", self.max_train_pairs, allowed)

    @property
    def seq_len(self) -> int:
        """Tokens of the longest training row."""
        return 2 * self.max_train_pairs + 1

    @property
    def in_words(self) -> str:
        """What a run trains on."""
        return f"recall of one of up to {self.max_train_pairs} pairs of a key and a value"


class Recall(SeededPuzzle):
    """Recall from the text before; a size is a number of pairs."""

    kind, noun, size_word = "recall", "question", "pairs"
    config: RecallConfig

    def __init__(self, config: RecallConfig, seed: int) -> None:
        super().__init__(config, seed)

    @property
    def words(self) -> Sequence[str]:
        """Keys k0, k1 ... and values v0, v1 ..."""
        keys = [f"k{number}" for number in range(self.config.num_keys)]
        return [*keys, *(f"v{number}" for number in range(self.config.num_values))]

    @property
    def form(self) -> str:
        """See ``Puzzle``."""
        keys, values = self.config.num_keys, self.config.num_values
        return (
            f"a question is pairs of a key, k0 to k{keys - 1}, and a value, v0 to v{values - 1}, "
            "and one of the keys again, such as k0 v0 k0"
        )

    @property
    def explained(self) -> str:
        """See ``Puzzle``."""
        return (
            "Keys stand before their values, and one of the keys stands at the end again; the "
            "answer is its value."
        )

    def places(self, size: int) -> Sequence[str | None]:
        """The values; without its key, a question has no answer."""
        pairs = [(None, f"value {number}") for number in range(1, size + 1)]
        return [*(place for pair in pairs for place in pair), None]

    @property
    def kinds(self) -> Sequence[int]:
        """Keys and values."""
        return self.config.num_keys, self.config.num_values

    @property
    def max_train_size(self) -> int:
        """See ``Puzzle``."""
        return self.config.max_train_pairs

    @property
    def max_size(self) -> int:
        """As many pairs as there are keys."""
        return self.config.num_keys

    def question_len(self, size: int) -> int:
        """The pairs, and the key that is asked for."""
        return 2 * size + 1

    def num_examples(self, size: int) -> int:
        """See ``Puzzle``."""
        orders = 1
        for used in range(size):
            orders *= self.config.num_keys - used
        return orders * int(self.config.num_values) ** size * size

    def num_draws(self, size: int) -> int:
        """See ``Puzzle``."""
        return self.config.num_keys + size + 1

    def write(self, draws: UInt64[np.ndarray, "B N"], size: int) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        num_keys = self.config.num_keys
        keys = np.argsort(draws[:, :num_keys], axis=1, kind="stable")[:, :size]
        values = below(draws[:, num_keys:-1], self.config.num_values) + num_keys
        pairs = np.stack([keys, values], axis=2).reshape(len(draws), 2 * size)
        asked = np.take_along_axis(keys, below(draws[:, -1:], size), axis=1)
        return np.concatenate([pairs, asked], axis=1)

    def targets(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        place = (tokens[:, :-1:2] == tokens[:, -1:]).argmax(axis=1)
        return last_only(tokens, np.take_along_axis(tokens, 2 * place[:, None] + 1, axis=1)[:, 0])

    def leak_baselines(self, size: int) -> dict[str, float]:
        """See ``Puzzle``; suffix_only sees the last pair and the question. All are exact.

        present: any value of the row, without its key.
        """
        self.check(size)
        chance = 1 / self.config.num_values
        one_pair = 1 / size + (1 - 1 / size) * chance
        return {
            "chance": chance,
            "majority": chance,
            "last_token": chance,
            "suffix_only": one_pair,
            "present": one_pair,
        }


@dataclass(frozen=True, kw_only=True)
class FactsConfig(PuzzleConfig):
    """Settings of facts; all are trained, because one that was never shown cannot be known.

    Attributes:
        num_subjects: Subjects.
        num_relations: Relations; each has a value for each subject.
        num_values: Different values; chance is 1 / num_values.
    """

    kind: ClassVar[str] = "facts"
    held_out_fraction: float = 0.0
    num_subjects: int = 256
    num_relations: int = 16
    num_values: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_subjects", "num_relations", "num_values")
        share = self.held_out_fraction
        require(share == 0, "held_out_fraction", share, "0: facts are not held out")

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return 2

    @property
    def in_words(self) -> str:
        """What a run trains on."""
        return f"{self.num_subjects * self.num_relations} facts"


class Facts(SeededPuzzle):
    """Recall from the weights; there is one size, one fact.

    Attributes:
        table: The value of each relation of each subject, as its token id.
    """

    kind, noun, size_word = "facts", "question", "facts"
    config: FactsConfig

    def __init__(self, config: FactsConfig, seed: int) -> None:
        super().__init__(config, seed)
        shape = (config.num_subjects, config.num_relations)
        cells = np.arange(shape[0] * shape[1]).reshape(shape)
        drawn = below(draw(cells, seed, TABLE), config.num_values)
        self.table: Int[np.ndarray, "S R"] = drawn + config.num_subjects + config.num_relations

    @property
    def words(self) -> Sequence[str]:
        """Subjects s0, s1 ..., relations r0, r1 ... and values v0, v1 ..."""
        counts = (self.config.num_subjects, self.config.num_relations, self.config.num_values)
        named = zip("srv", counts, strict=True)
        return [f"{letter}{number}" for letter, count in named for number in range(count)]

    @property
    def form(self) -> str:
        """See ``Puzzle``."""
        subjects, relations = self.config.num_subjects, self.config.num_relations
        return (
            f"a question is a subject, s0 to s{subjects - 1}, and a relation, "
            f"r0 to r{relations - 1}, such as s0 r0"
        )

    @property
    def explained(self) -> str:
        """See ``Puzzle``."""
        return (
            "A question is a subject and a relation; the answer is the value that was learnt for "
            "the two, which follows from nothing else."
        )

    def places(self, size: int) -> Sequence[str | None]:
        """See ``Puzzle``."""
        return ["subject", "relation"]

    @property
    def kinds(self) -> Sequence[int]:
        """Subjects, relations and values."""
        return self.config.num_subjects, self.config.num_relations, self.config.num_values

    @property
    def max_train_size(self) -> int:
        """See ``Puzzle``."""
        return 1

    @property
    def max_size(self) -> int:
        """One fact."""
        return 1

    def question_len(self, size: int) -> int:
        """The subject and the relation."""
        return 2

    def num_examples(self, size: int) -> int:
        """Number of facts."""
        return self.table.size

    def num_draws(self, size: int) -> int:
        """See ``Puzzle``."""
        return 1

    def write(self, draws: UInt64[np.ndarray, "B N"], size: int) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        subject, relation = np.divmod(below(draws, self.table.size), self.config.num_relations)
        return np.concatenate([subject, relation + self.config.num_subjects], axis=1)

    def targets(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        return last_only(tokens, self.table[tokens[:, 0], tokens[:, 1] - self.config.num_subjects])

    def leak_baselines(self, size: int) -> dict[str, float]:
        """See ``Puzzle``; suffix_only is last_token, the relation without the subject.

        All are exact for this table: what a guesser knows who has seen all of it.
        """
        self.check(size)
        first = self.config.num_subjects + self.config.num_relations
        counts = np.stack(
            [np.bincount(c - first, minlength=self.config.num_values) for c in self.table.T]
        )
        by_relation = float(counts.max(axis=1).sum() / self.table.size)
        return {
            "chance": 1 / self.config.num_values,
            "majority": float(counts.sum(axis=0).max() / self.table.size),
            "last_token": by_relation,
            "suffix_only": by_relation,
        }
