"""Addition of several numbers, written digit by digit, the lowest digit first.

    4 7 + 8 5 =   ->   2 3 1          (74 + 58 = 132)

All numbers have the same digits, and all answers: leading zeros are written. The answer is read
token by token; in training the right digits so far stand before each.

Source: Saunshi et al., "Reasoning with Latent Thoughts" (2502.17416), addition of n numbers; digits
and order are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int, UInt64

from openmythos.config.schema import require, require_positive
from openmythos.data.packing import IGNORED_TARGET
from openmythos.data.puzzle import PuzzleConfig, SeededPuzzle, below

_PLUS, _EQUALS = 10, 11


@dataclass(frozen=True, kw_only=True)
class AdditionConfig(PuzzleConfig):
    """Settings of addition.

    Attributes:
        num_digits: Digits of each number.
        max_train_terms: Most numbers of a training row; the fewest are two.
        max_terms: Most numbers that the digits of an answer have room for.
    """

    kind: ClassVar[str] = "addition"
    num_digits: int = 2
    max_train_terms: int = 4
    max_terms: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_digits")
        require(self.num_digits <= 6, "num_digits", self.num_digits, "at most 6")
        train, most = self.max_train_terms, self.max_terms
        require(2 <= train <= most, "max_train_terms", train, f"2 to max_terms={most}")
        require(most <= 64, "max_terms", most, "at most 64")

    @property
    def answer_len(self) -> int:
        """Digits of an answer."""
        return len(str(self.max_terms * (10**self.num_digits - 1)))

    @property
    def seq_len(self) -> int:
        """Tokens of the longest training row."""
        return self.max_train_terms * (self.num_digits + 1) + self.answer_len - 1

    @property
    def in_words(self) -> str:
        """What a run trains on."""
        return f"sums of 2 to {self.max_train_terms} numbers of {self.num_digits} digits"


class Addition(SeededPuzzle):
    """Addition; a size is a number of terms."""

    kind, noun, size_word = "addition", "sum", "terms"
    least_size = 2
    config: AdditionConfig

    def __init__(self, config: AdditionConfig, seed: int) -> None:
        super().__init__(config, seed)

    @property
    def words(self) -> Sequence[str]:
        """The digits, + and =."""
        return [*map(str, range(10)), "+", "="]

    @property
    def form(self) -> str:
        """See ``Puzzle``."""
        digits = self.config.num_digits
        zeros = " 0" * (digits - 1)
        return (
            f"a sum is numbers of {digits} digits, the lowest digit first, with + between them and "
            f"= at the end, such as 4{zeros} + 8{zeros} ="
        )

    @property
    def explained(self) -> str:
        """See ``Puzzle``."""
        digits = " ".join("472598"[: self.config.num_digits])
        number = digits.replace(" ", "")[::-1]
        return (
            f"Numbers are written with their lowest digit first, {digits} for {number}; the answer "
            "is their sum, written the same way."
        )

    def places(self, size: int) -> Sequence[str | None]:
        """Digits have the value of a 1 there; the signs stay."""
        digits = range(self.config.num_digits)
        values = [f", {10**place:,}s" for place in digits] if len(digits) > 1 else [""]
        rows = [[f"number {row}{value}" for value in values] for row in range(1, size + 1)]
        return [place for row in rows for place in (*row, None)]

    @property
    def kinds(self) -> Sequence[int]:
        """Digits, + and =."""
        return 10, 1, 1

    @property
    def max_train_size(self) -> int:
        """See ``Puzzle``."""
        return self.config.max_train_terms

    @property
    def max_size(self) -> int:
        """As many terms as the digits of an answer have room for."""
        return self.config.max_terms

    def question_len(self, size: int) -> int:
        """The numbers, each with the sign after it."""
        return size * (self.config.num_digits + 1)

    def answer_len(self, question_len: int) -> int:
        """As many digits whatever the numbers."""
        return self.config.answer_len

    def num_examples(self, size: int) -> int:
        """See ``Puzzle``."""
        return 10 ** (int(self.config.num_digits) * size)

    def num_draws(self, size: int) -> int:
        """See ``Puzzle``."""
        return size

    def write(self, draws: UInt64[np.ndarray, "B N"], size: int) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        numbers = below(draws, 10**self.config.num_digits)
        terms = self._digits(numbers, self.config.num_digits)
        marks = np.full((*numbers.shape, 1), _PLUS)
        marks[:, -1] = _EQUALS
        question = np.concatenate([terms, marks], axis=2).reshape(len(draws), -1)
        answer = self._digits(numbers.sum(axis=1), self.config.answer_len)
        return np.concatenate([question, answer[:, :-1]], axis=1)

    def targets(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The digits of the sum, from the equals sign on."""
        digits, start = self.config.num_digits, tokens.shape[1] - self.config.answer_len
        terms = tokens[:, : start + 1].reshape(len(tokens), -1, digits + 1)[:, :, :digits]
        sums = (terms * 10 ** np.arange(digits)).sum(axis=(1, 2))
        targets = np.full_like(tokens, IGNORED_TARGET)
        targets[:, start:] = self._digits(sums, self.config.answer_len)
        return targets

    def on_the_way(self, questions: Int[np.ndarray, "B T"]) -> dict[str, Int[np.ndarray, " B"]]:
        """The 1s of the sums of the first numbers; the answer begins with those of all."""
        digits = questions[:, :: self.config.num_digits + 1].cumsum(axis=1).T % 10
        return {f"1s of the first {n} numbers": digits[n - 1] for n in range(2, len(digits))}

    def leak_baselines(self, size: int) -> dict[str, float]:
        """See ``Puzzle``, for whole sums; suffix_only sees the last two numbers. All are exact."""
        self.check(size)
        numbers = 10**self.config.num_digits
        return {
            "chance": 1 / (size * (numbers - 1) + 1),
            "majority": _commonest_sum(numbers, size),
            "last_token": _commonest_sum(numbers, size - 1),
            "suffix_only": _commonest_sum(numbers, size - 2),
        }

    def _digits(self, numbers: Int[np.ndarray, "*B"], width: int) -> Int[np.ndarray, "*B W"]:
        return numbers[..., None] // 10 ** np.arange(width) % 10


def _commonest_sum(numbers: int, terms: int) -> float:
    """Probability of the commonest sum of so many uniform numbers."""
    shares = np.ones(1)
    for _ in range(terms):
        shares = np.convolve(shares, np.full(numbers, 1 / numbers))
    return float(shares.max())
