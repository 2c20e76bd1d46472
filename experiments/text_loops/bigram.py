"""A bigram model: how surprising a token is without any looped model's opinion."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from openmythos.data.loader import TokenLoader
from openmythos.data.packing import IGNORED_TARGET


@dataclass(frozen=True)
class Bigrams:
    """Counts of pairs in the training text, and the smoothed probability of single tokens."""

    pairs: Int[np.ndarray, "V V"]
    single: Float[np.ndarray, " V"]

    @staticmethod
    def of(loader: TokenLoader) -> "Bigrams":
        """Counted over one pass of the split."""
        size = loader.tokenizer.vocab_size
        cells = []
        for batch in loader.validation_batches():
            counted = batch.targets != IGNORED_TARGET
            cells.append((batch.tokens[counted] * size + batch.targets[counted]).numpy())
        pairs = np.bincount(np.concatenate(cells), minlength=size * size).reshape(size, size)
        follows = pairs.sum(axis=0) + 1.0
        return Bigrams(pairs, follows / follows.sum())

    def surprisal(
        self, tokens: Int[np.ndarray, " N"], targets: Int[np.ndarray, " N"]
    ) -> Float[np.ndarray, " N"]:
        """Bits of each target after its token, smoothed with single tokens.

        Source: Witten and Bell 1991, method C: the weight of the single tokens is the number of
        different successors that were seen.
        """
        seen = self.pairs.sum(axis=1)[tokens]
        kinds = (self.pairs > 0).sum(axis=1)[tokens]
        pair = self.pairs[tokens, targets]
        whole = np.where(seen + kinds > 0, seen + kinds, 1)
        weight = np.where(seen + kinds > 0, kinds, 1)
        return -np.log2((pair + weight * self.single[targets]) / whole)
