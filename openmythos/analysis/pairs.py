"""Pairs of texts that differ in one column only: what a reading map compares.

A column is a token of a puzzle's question, or the tokens of a text at certain distances. In each
pair one text is clean, and in the other the tokens of that column are replaced. Both are read at
the last token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.data.packing import IGNORED_TARGET
from openmythos.data.puzzle import Puzzle


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """N clean texts of T tokens, and for each of K columns the same with that column corrupted.

    Attributes:
        columns: The columns' names.
        tokens: The clean texts.
        corrupted: The corrupted texts; a column consists of the tokens that differ.
        answers: The token that should follow each clean text.
        counterfactual_answers: The one that should follow each corrupted text or, where nobody
            knows it, any other token to compare with.
        counted: The pairs that count; for example, both answers must differ.
    """

    columns: tuple[str, ...]
    tokens: Int[Tensor, "N T"]
    corrupted: Int[Tensor, "K N T"]
    answers: Int[Tensor, "N"]
    counterfactual_answers: Int[Tensor, "K N"]
    counted: Bool[Tensor, "K N"]

    def __post_init__(self) -> None:
        """Check the shapes, and that the last token, which is read, is clean."""
        rows, columns = self.tokens.shape[0], len(self.columns)
        shapes = {
            "corrupted": (columns, *self.tokens.shape),
            "answers": (rows,),
            "counterfactual_answers": (columns, rows),
            "counted": (columns, rows),
        }
        for name, shape in shapes.items():
            given = tuple(getattr(self, name).shape)
            if given != shape:
                raise ValueError(
                    f"{name} has shape {given}; for {columns} columns and tokens of shape "
                    f"{tuple(self.tokens.shape)} it must have {shape}"
                )
        if bool((self.corrupted[..., -1] != self.tokens[:, -1]).any()):
            raise ValueError(
                "the last token is corrupted in some pair; it is where the answer is read, so "
                "corrupt tokens before it"
            )

    def __len__(self) -> int:
        """The number of clean texts."""
        return len(self.tokens)

    def batches(self, size: int) -> Iterator["Pairs"]:
        """The pairs in order, at most ``size`` clean texts at a time.

        Raises:
            ValueError: ``size`` is below 1.
        """
        if size < 1:
            raise ValueError(f"batch_size is {size}; it must be at least 1")
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield replace(
                self,
                tokens=self.tokens[rows],
                corrupted=self.corrupted[:, rows],
                answers=self.answers[rows],
                counterfactual_answers=self.counterfactual_answers[:, rows],
                counted=self.counted[:, rows],
            )

    def each_column(self) -> Iterator["Pairs"]:
        """The pairs of one column after the other."""
        for number, name in enumerate(self.columns):
            part = slice(number, number + 1)
            yield replace(
                self,
                columns=(name,),
                corrupted=self.corrupted[part],
                counterfactual_answers=self.counterfactual_answers[part],
                counted=self.counted[part],
            )

    def to(self, device: torch.device) -> "Pairs":
        """The same pairs on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "columns"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def puzzle_pairs(puzzle: Puzzle, size: int, num_examples: int = 512, seed: int = 0) -> Pairs:
    """Held-out questions; the columns are their tokens but the last, which is read.

    A corrupted token is drawn from the others of its kind; where there is no other, as for a plus
    sign, there is no column. Of an answer of several tokens the first one is looked at. A pair
    counts if it changes.

    Raises:
        ValueError: A number is out of range, or no token can be replaced.
    """
    asked, kinds = puzzle.question_len(size), np.asarray(puzzle.kinds)
    clean = puzzle.held_out_batch(size, num_examples, seed).tokens.numpy()
    ends = kinds.cumsum()
    draw = np.random.default_rng(seed)
    names, corrupted = [], []
    for column, name in enumerate(puzzle.places(size)[: asked - 1]):
        kind = int(np.searchsorted(ends, clean[0, column], side="right"))
        count, first = int(kinds[kind]), int(ends[kind] - kinds[kind])
        if name is None or count == 1:
            continue
        texts = clean.copy()
        moved = texts[:, column] - first + draw.integers(1, count, len(clean))
        texts[:, column] = first + moved % count
        names.append(name)
        corrupted.append(texts)
    if not names:
        raise ValueError(
            f"in a {puzzle.noun} of {size} {puzzle.size_word} nothing can be replaced before the "
            "last token, which is read; give a larger one"
        )
    answers = puzzle.targets(clean)[:, asked - 1]
    others = np.stack([puzzle.targets(texts)[:, asked - 1] for texts in corrupted])
    known = others != IGNORED_TARGET
    return Pairs(
        columns=tuple(names),
        tokens=torch.from_numpy(clean[:, :asked]),
        corrupted=torch.from_numpy(np.stack(corrupted)[:, :, :asked]),
        answers=torch.from_numpy(answers),
        # Where there is no answer, any token: such a pair does not count.
        counterfactual_answers=torch.from_numpy(np.where(known, others, 0)),
        counted=torch.from_numpy(known & (others != answers)),
    )


def text_pairs(
    corpus: Int[Tensor, "C"], length: int, num_examples: int = 256, seed: int = 0
) -> Pairs:
    """Windows of a text; the answer is the next token, the columns are distances from the last one.

    The columns are the tokens 1 before the last, 2 to 3, 4 to 7, and so on. All tokens of a column
    are replaced by tokens drawn from the corpus; so is the answer, for the answer to compare with.

    Args:
        corpus: The token ids of the text.
        length: Tokens per window, at least 2.
        num_examples: Number of windows, which begin at random places.
        seed: Of the places and of all drawn tokens.

    Raises:
        ValueError: The windows are too short, or longer than the text.
    """
    if not 2 <= length < len(corpus):
        raise ValueError(
            f"length is {length} and the text has {len(corpus)} tokens; give at least 2 and less "
            "than the text has"
        )
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(corpus) - length, (num_examples, 1), generator=draw)
    windows = corpus.cpu()[starts + torch.arange(length + 1)]
    tokens, answers = windows[:, :-1], windows[:, -1]
    distance = length - 1 - torch.arange(length)
    names, corrupted = [], []
    low = 1
    while low < length:
        high = min(2 * low - 1, length - 1)
        drawn = corpus.cpu()[torch.randint(len(corpus), tokens.shape, generator=draw)]
        corrupted.append(torch.where((distance >= low) & (distance <= high), drawn, tokens))
        names.append(str(low) if high == low else f"{low}-{high}")
        low *= 2
    texts = torch.stack(corrupted)
    places = torch.randint(len(corpus), (len(names), num_examples), generator=draw)
    others = corpus.cpu()[places]
    return Pairs(
        columns=tuple(names),
        tokens=tokens,
        corrupted=texts,
        answers=answers,
        counterfactual_answers=others,
        counted=(others != answers) & (texts != tokens).any(dim=-1),
    )
