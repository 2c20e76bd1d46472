"""Multi-hop induction (p-hop): look back for the same letter, step to the one after it, p times.

    <p> <letter 1> ... <letter n>      target after letter i: the letter that p hops from i lead to

A hop goes from a letter to its previous occurrence, and from there one letter to the right. Where
there is none, there is no target. No letter stands twice in a row.

Source: Sanford, Hsu, Telgarsky, "Transformers, parallel computation, and logarithmic depth"
(2402.09268), the k-hop task; chsanford/hop-induction-heads.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int, UInt64

from openmythos.config.schema import require, require_positive
from openmythos.data.packing import IGNORED_TARGET
from openmythos.data.puzzle import GUESS, PuzzleConfig, SeededPuzzle, below

_GUESSED_ROWS, _SUFFIX = 32768, 4


@dataclass(frozen=True, kw_only=True)
class InductionConfig(PuzzleConfig):
    """Settings of multi-hop induction.

    Attributes:
        num_letters: Different letters.
        length: Letters of a row.
        max_train_hops: Most hops; rows of each number of hops are trained alike.
    """

    kind: ClassVar[str] = "induction"
    num_letters: int = 4
    length: int = 32
    max_train_hops: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "length", "max_train_hops")
        require(3 <= self.num_letters <= 26, "num_letters", self.num_letters, "3 to 26")
        least = 2 * self.max_train_hops + 1
        allowed = f"at least {least}, for max_train_hops={self.max_train_hops}"
        require(self.length >= least, "length", self.length, allowed)

    @property
    def seq_len(self) -> int:
        """Tokens of a row: the hops, and the letters."""
        return 1 + self.length

    @property
    def in_words(self) -> str:
        """What a run trains on."""
        hops = self.max_train_hops
        return f"induction of up to {hops} hops over {self.length} of {self.num_letters} letters"


class Induction(SeededPuzzle):
    """Multi-hop induction; a size is a number of hops, and its answer that of the last letter."""

    kind, noun, size_word = "induction", "row", "hops"
    config: InductionConfig

    def __init__(self, config: InductionConfig, seed: int) -> None:
        super().__init__(config, seed)

    @property
    def words(self) -> Sequence[str]:
        """The letters, and the numbers of hops."""
        hops = range(1, self.config.max_train_hops + 1)
        return [*string.ascii_lowercase[: self.config.num_letters], *(f"hop{n}" for n in hops)]

    @property
    def form(self) -> str:
        """See ``Puzzle``."""
        most, last = self.config.max_train_hops, self.words[self.config.num_letters - 1]
        return (
            f"a row is a number of hops, hop1 to hop{most}, and letters, a to {last}, "
            "such as hop1 a b c a"
        )

    @property
    def explained(self) -> str:
        """See ``Puzzle``."""
        return (
            "Begin at the last letter and, as often as the first word says, go back to where the "
            "same letter stood before and one to the right; the answer is the letter there."
        )

    def places(self, size: int) -> Sequence[str | None]:
        """See ``Puzzle``."""
        return ["hops", *(f"letter {number}" for number in range(1, self.config.length + 1))]

    @property
    def kinds(self) -> Sequence[int]:
        """Letters and numbers of hops."""
        return self.config.num_letters, self.config.max_train_hops

    @property
    def max_train_size(self) -> int:
        """See ``Puzzle``."""
        return self.config.max_train_hops

    @property
    def max_size(self) -> int:
        """The most hops that have a word."""
        return self.config.max_train_hops

    def question_len(self, size: int) -> int:
        """See ``Puzzle``."""
        return self.config.seq_len

    def num_examples(self, size: int) -> int:
        """Rows of letters, those without an answer too."""
        letters = int(self.config.num_letters)
        return letters * (letters - 1) ** (self.config.length - 1)

    def num_draws(self, size: int) -> int:
        """See ``Puzzle``."""
        return self.config.length

    def write(self, draws: UInt64[np.ndarray, "B N"], size: int) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        first = below(draws[:, :1], self.config.num_letters)
        steps = 1 + below(draws[:, 1:], self.config.num_letters - 1)  # never to the same letter
        letters = np.concatenate([first, steps], axis=1).cumsum(axis=1) % self.config.num_letters
        hops = np.full_like(first, self.config.num_letters + size - 1)
        return np.concatenate([hops, letters], axis=1)

    def targets(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``; all rows have as many hops as the first."""
        letters, size = tokens[:, 1:], self._hops(tokens)
        places = self.places_after(letters, size)
        reached = np.take_along_axis(letters, np.maximum(places, 0), axis=1)
        targets = np.full_like(tokens, IGNORED_TARGET)
        targets[:, 1:] = np.where(places < 0, IGNORED_TARGET, reached)
        return targets

    def places_after(self, letters: Int[np.ndarray, "B N"], size: int) -> Int[np.ndarray, "B N"]:
        """The place that ``size`` hops lead to from each place; -1 where there is none."""
        rows = np.arange(len(letters))
        after = np.full((len(letters), self.config.num_letters), -1)  # of each letter's last place
        hop = np.empty_like(letters)
        for place, letter in enumerate(letters.T):
            hop[:, place] = after[rows, letter]
            after[rows, letter] = place + 1
        places = np.broadcast_to(np.arange(letters.shape[1]), letters.shape)
        for _ in range(size):
            onward = np.take_along_axis(hop, np.maximum(places, 0), axis=1)
            places = np.where(places < 0, -1, onward)
        return places

    def on_the_way(self, questions: Int[np.ndarray, "B T"]) -> dict[str, Int[np.ndarray, " B"]]:
        """The letters that the hops before the last one lead to."""
        letters, size = questions[:, 1:], self._hops(questions)
        rows = np.arange(len(letters))
        return {
            f"letter after hop {hop}": letters[rows, self.places_after(letters, hop)[:, -1]]
            for hop in range(1, size)
        }

    def possible(self, tokens: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, " B"]:
        """Rows whose last letter has a target."""
        return self.targets(tokens)[:, -1] != IGNORED_TARGET

    def leak_baselines(self, size: int) -> dict[str, float]:
        """See ``Puzzle``; suffix_only sees the last four letters.

        Guessers are fitted to half of 32,768 sampled rows and measured on the others.
        """
        self.check(size)
        batch = self._batch(np.arange(_GUESSED_ROWS), size, GUESS, 0, held_out=False)
        letters, answers = batch.tokens.numpy()[:, 1:], batch.targets.numpy()[:, -1]
        seen = {"majority": 0, "last_token": 1, "suffix_only": min(_SUFFIX, self.config.length)}
        base = self.config.num_letters
        found = {"chance": 1 / base}
        for name, width in seen.items():
            weights = base ** np.arange(width)
            keys = (letters[:, letters.shape[1] - width :] * weights).sum(axis=1)
            found[name] = _fitted_guess(keys, answers, base**width, base)
        return found

    def _hops(self, tokens: Int[np.ndarray, "B T"]) -> int:
        return int(tokens[0, 0]) - self.config.num_letters + 1


def _fitted_guess(
    keys: Int[np.ndarray, " B"], answers: Int[np.ndarray, " B"], num_keys: int, num_answers: int
) -> float:
    """Share of the second half that the first half's most frequent answer by key gets right."""
    half = len(keys) // 2
    counts = np.zeros((num_keys, num_answers), dtype=np.int64)
    np.add.at(counts, (keys[:half], answers[:half]), 1)
    return float((counts.argmax(axis=1)[keys[half:]] == answers[half:]).mean())
