"""Products of permutations: what the whole group of S3 (or S4, S5) does, factor by factor.

    <factor 1> ... <factor n>      target after factor i: the product of factors 1 .. i

Each token is a permutation, and the product of a and b does a first, then b. All factors up to a
position are needed there: without one of them, every product is equally likely.

Source: "To CoT or to Loop?" (2505.19245), the word problem of a group; the generator of
kevin671/cot-vs-loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int, UInt64

from openmythos.config.schema import require, require_positive
from openmythos.data.puzzle import PuzzleConfig, SeededPuzzle, below


@dataclass(frozen=True, kw_only=True)
class ProductsConfig(PuzzleConfig):
    """Settings of products of permutations.

    Attributes:
        num_points: Points that are permuted: 3 is the group S3, with 6 elements.
        max_train_factors: Factors of a training row.
    """

    kind: ClassVar[str] = "products"
    num_points: int = 3
    max_train_factors: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "max_train_factors")
        require(2 <= self.num_points <= 5, "num_points", self.num_points, "2 to 5")

    @property
    def seq_len(self) -> int:
        """Tokens of a training row."""
        return self.max_train_factors

    @property
    def in_words(self) -> str:
        """What a run trains on."""
        return f"products of {self.max_train_factors} permutations of {self.num_points} points"


class Products(SeededPuzzle):
    """Prefix products; a size is a number of factors, and its answer the product of all of them.

    Training rows all have ``max_train_factors``: the targets at their earlier positions are those
    of shorter products.

    Attributes:
        compose: Number of the permutation that does a first, then b, by the numbers of a and b.
    """

    kind, noun, size_word = "products", "product", "factors"
    config: ProductsConfig

    def __init__(self, config: ProductsConfig, seed: int) -> None:
        super().__init__(config, seed)
        permutations = list(itertools.permutations(range(config.num_points)))
        number = {images: index for index, images in enumerate(permutations)}
        self.compose: Int[np.ndarray, "G G"] = np.array(
            [[number[tuple(b[image] for image in a)] for b in permutations] for a in permutations]
        )
        self._words = ["".join(str(image + 1) for image in images) for images in permutations]

    @property
    def words(self) -> Sequence[str]:
        """The images of the points 1, 2 ... under each permutation."""
        return self._words

    @property
    def form(self) -> str:
        """See ``Puzzle``."""
        first, last = self.words[0], self.words[-1]
        return (
            f"a product is a row of permutations, {first} to {last}, done from left to right, "
            f"such as {self.words[1]} {last} {first}"
        )

    @property
    def explained(self) -> str:
        """See ``Puzzle``."""
        images = self.words[-2]
        moves = [f"{point} to {image}" for point, image in enumerate(images, start=1)]
        return (
            f"Each word moves {self.config.num_points} points, {images} the point "
            f"{', '.join(moves[:-1])} and {moves[-1]}; the answer is the one word that does what "
            "all of them do one after the other."
        )

    def places(self, size: int) -> Sequence[str | None]:
        """See ``Puzzle``."""
        return [f"factor {number}" for number in range(1, size + 1)]

    @property
    def kinds(self) -> Sequence[int]:
        """The permutations."""
        return (len(self.words),)

    @property
    def max_train_size(self) -> int:
        """See ``Puzzle``."""
        return self.config.max_train_factors

    @property
    def train_sizes(self) -> range:
        """The one size of training."""
        return range(self.max_train_size, self.max_train_size + 1)

    def question_len(self, size: int) -> int:
        """One per factor."""
        return size

    def num_examples(self, size: int) -> int:
        """See ``Puzzle``."""
        return len(self.words) ** size

    def num_draws(self, size: int) -> int:
        """See ``Puzzle``."""
        return size

    def write(self, draws: UInt64[np.ndarray, "B N"], size: int) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        return below(draws, len(self.words))

    def targets(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The product up to each position."""
        products = tokens.copy()
        for place in range(1, tokens.shape[1]):
            products[:, place] = self.compose[products[:, place - 1], tokens[:, place]]
        return products

    def on_the_way(self, questions: Int[np.ndarray, "B T"]) -> dict[str, Int[np.ndarray, " B"]]:
        """The products of the first factors."""
        products = self.targets(questions).T
        return {f"product of {n} factors": products[n - 1] for n in range(2, len(products))}

    def leak_baselines(self, size: int) -> dict[str, float]:
        """See ``Puzzle``; suffix_only sees all factors but the first.

        In a group, the product is uniform given all factors but one, so that the values are exact.
        """
        self.check(size)
        chance = 1 / len(self.words)
        last = 1.0 if size == 1 else chance
        return {"chance": chance, "majority": chance, "last_token": last, "suffix_only": chance}
