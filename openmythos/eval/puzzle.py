"""Puzzles as text for evaluators, such as the walk ``e3 r1 r0`` -> ``e7``.

Each word is one token id of the puzzle; there are no special tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from openmythos.config.schema import from_dict
from openmythos.data.puzzle import Puzzle
from openmythos.data.synthetic import HopsConfig, Walks

NUM_ASKED, ASKED_SEED = 512, 1  # as in the demo's grid


class PuzzleCodec:
    """Words of a puzzle to token ids and back.

    Attributes:
        puzzle: The puzzle itself.
        words: The word of each id.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    begin_ids: tuple[int, ...] = ()
    end_ids: frozenset[int] = frozenset()
    chat_template: None = None
    generation: Mapping[str, Any] = {}
    sampling: Mapping[str, Any] = {}

    def __init__(self, puzzle: Puzzle) -> None:
        self.puzzle, self.words = puzzle, list(puzzle.words)
        self._ids = {word: index for index, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, one for each word."""
        return len(self.words)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of words separated by white space; there are no special tokens.

        Raises:
            ValueError: A word is none of the puzzle's.
        """
        words = text.split()
        for word in words:
            if word not in self._ids:
                raise ValueError(f"{word!r} is no word of a {self.puzzle.noun}; {self.puzzle.form}")
        return [self._ids[word] for word in words]

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a question; nothing is put before it.

        Raises:
            ValueError: There is no word, or one that is none of the puzzle's.
        """
        if not text.strip():
            raise ValueError(f"there is no {self.puzzle.noun}; {self.puzzle.form}")
        return self.encode(text)

    def require_lossless(self, purpose: str, *texts: str) -> None:
        """Nothing: words come back as they are, but for the white space between them."""

    def decode(self, ids: Iterable[int]) -> str:
        """The words, separated by spaces."""
        return " ".join(self.words[index] for index in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The words as a continuation: each with a space before it."""
        return "".join(f" {self.words[index]}" for index in ids).encode()


def puzzle_documents(
    puzzle: Puzzle, size: int, count: int = NUM_ASKED, seed: int = ASKED_SEED
) -> list[dict[str, str]]:
    """Held-out examples of exactly this size: ``context`` and ``target``."""
    batch, codec = puzzle.held_out_batch(size, count, seed), PuzzleCodec(puzzle)
    asked = puzzle.question_len(size)
    return [
        {"context": codec.decode(tokens[:asked]), "target": " " + codec.decode(answer)}
        for tokens, answer in zip(
            batch.tokens.tolist(), batch.targets[:, asked - 1 :].tolist(), strict=True
        )
    ]


def hops_dataset(num_hops: int, walks: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Documents of walks in lm-evaluation-harness' format (``custom_dataset``).

    Args:
        num_hops: Hops per walk.
        walks: The fields of the ``HopsConfig`` that the model was trained on.
    """
    from datasets import Dataset

    puzzle = Walks(from_dict(HopsConfig, walks))
    return {"test": Dataset.from_list(puzzle_documents(puzzle, num_hops))}
