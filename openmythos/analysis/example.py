"""What a model is analysed on: rows of tokens, what is asked of them, and what lenses look for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.data.packing import IGNORED_TARGET
from openmythos.data.puzzle import Puzzle
from openmythos.model.context import ForwardContext
from openmythos.model.recurrent import RecurrentDepthLM

CONTROL = "control"  # a token that should not come closer


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows of equal length; shorter texts are padded on the right.

    Attributes:
        what: A row in words.
        tokens: Token ids.
        valid: False at padding.
        answers: The right next token; -100 where nothing is asked.
        is_text: Whether each next token is asked for, which has no certain answer.
        first: The number of the first row; a row's number is the seed of a random initial state.
        concepts: Other tokens whose ranks are read where something is asked, by name; -100 where
            there is none. ``CONTROL`` is one that is not to be expected there.
    """

    what: str
    tokens: Int[Tensor, "N T"]
    valid: Bool[Tensor, "N T"]
    answers: Int[Tensor, "N T"]
    is_text: bool = False
    first: int = 0
    concepts: Mapping[str, Int[Tensor, "N T"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def asked(self) -> Bool[Tensor, "N T"]:
        """Where something is asked."""
        return self.answers != IGNORED_TARGET

    def rows(self, start: int, stop: int) -> "Examples":
        """Some of the rows."""
        part = slice(start, stop)
        return replace(self._map(lambda tokens: tokens[part]), first=self.first + start)

    def batches(self, size: int) -> "Iterator[Examples]":
        """All rows, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.rows(start, start + size)

    def context(self, model: RecurrentDepthLM) -> ForwardContext:
        """The context of all rows."""
        seeds = range(self.first, self.first + len(self))
        padding = None if bool(self.valid.all()) else self.valid
        return model.context(self.tokens, padding_mask=padding, seeds=list(seeds))

    def to(self, device: torch.device) -> "Examples":
        """The same rows on a device."""
        return self._map(lambda tokens: tokens.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Examples":
        return replace(
            self,
            tokens=change(self.tokens),
            valid=change(self.valid),
            answers=change(self.answers),
            concepts={name: change(tokens) for name, tokens in self.concepts.items()},
        )


def puzzle_examples(puzzle: Puzzle, size: int, num_rows: int, seed: int = 0) -> Examples:
    """Held-out questions, asked for the first token of the answer.

    The concepts are the results on the way. The control is a word that could be an answer and is
    neither right nor on the way nor, if there is such a one, in the question.
    """
    batch, asked = puzzle.held_out_batch(size, num_rows, seed), puzzle.question_len(size)
    tokens, right = batch.tokens[:, :asked], batch.targets[:, asked - 1].numpy()
    way = puzzle.on_the_way(tokens.numpy())
    ends = np.cumsum(puzzle.kinds)
    kind = int(np.searchsorted(ends, right[0], side="right"))
    first = int(ends[kind]) - puzzle.kinds[kind]
    draws = np.random.default_rng(seed).random((num_rows, puzzle.kinds[kind]))
    words = np.arange(first, first + puzzle.kinds[kind])
    draws += (tokens.numpy()[:, :, None] == words).any(axis=1)  # rather one not in the question
    for taken in (*way.values(), right):
        np.put_along_axis(draws, taken[:, None] - first, np.inf, axis=1)
    found = words[draws.argmin(axis=1)]
    control = np.where(np.isfinite(draws.min(axis=1)), found, IGNORED_TARGET)

    def at_end(values: np.ndarray) -> Tensor:
        wanted = torch.full_like(tokens, IGNORED_TARGET)
        wanted[:, -1] = torch.from_numpy(values)
        return wanted

    return Examples(
        what=puzzle.in_words(size),
        tokens=tokens,
        valid=torch.ones_like(tokens, dtype=torch.bool),
        answers=at_end(right),
        concepts={name: at_end(values) for name, values in {**way, CONTROL: control}.items()},
    )


def text_examples(windows: Sequence[Sequence[int]], what: str) -> Examples:
    """Windows of text, asked for each next token.

    The control is the token that follows most often; where it is right itself, there is none.

    Raises:
        ValueError: No window has two tokens.
    """
    kept = [window for window in windows if len(window) > 1]
    if not kept:
        raise ValueError("the text is too short: no row has two tokens; give more text")
    length = max(map(len, kept)) - 1
    tokens = torch.zeros(len(kept), length, dtype=torch.int64)
    answers = torch.full_like(tokens, IGNORED_TARGET)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    for row, window in enumerate(kept):
        ids, size = torch.tensor(window), len(window) - 1
        tokens[row, :size], answers[row, :size], valid[row, :size] = ids[:-1], ids[1:], True
    asked = answers != IGNORED_TARGET
    commonest = int(answers[asked].mode().values)
    control = torch.where(asked & (answers != commonest), commonest, IGNORED_TARGET)
    return Examples(
        what=what,
        tokens=tokens,
        valid=valid,
        answers=answers,
        is_text=True,
        concepts={CONTROL: control},
    )
