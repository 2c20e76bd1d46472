"""The ``hops`` task as text, so that every evaluator can ask it: ``e3 r1 r0`` -> ``e7``.

A walk's words are the token ids of ``data.synthetic``: entities first, then relations. There are no
special tokens.
"""

from collections.abc import Iterable
from typing import Any

from openmythos.data.synthetic import HopsConfig, Walks

NUM_WALKS, WALK_SEED = 512, 1  # those of the demo's grid


class WalkCodec:
    """Words of walks to token ids and back."""

    bos_id: int | None = None
    eos_id: int | None = None

    def __init__(self, walks: Walks) -> None:
        entities = [f"e{number}" for number in range(walks.config.num_entities)]
        self.words = [*entities, *(f"r{number}" for number in range(walks.config.num_relations))]
        self._ids = {word: index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Ids of words between white space.

        Raises:
            ValueError: A word that no walk has.
        """
        words = text.split()
        for word in words:
            if word not in self._ids:
                raise ValueError(
                    f"{word!r} is no word of a walk; the model knows {self.words[0]} to "
                    f"{self.words[-1]} and can be asked hops_1, hops_2 ... only"
                )
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """Words with a space between."""
        return " ".join(self.words[index] for index in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Words as they go on a text: each with the space before it."""
        return "".join(f" {self.words[index]}" for index in ids).encode()


def hops_documents(
    walks: Walks, num_hops: int, size: int = NUM_WALKS, seed: int = WALK_SEED
) -> list[dict[str, str]]:
    """Held-out walks of exactly ``num_hops`` hops: ``context`` and ``target``."""
    batch, codec = walks.held_out_batch(num_hops, size, seed), WalkCodec(walks)
    return [
        {"context": codec.decode(walk), "target": " " + codec.decode([answer])}
        for walk, answer in zip(batch.tokens.tolist(), batch.targets[:, -1].tolist(), strict=True)
    ]


def hops_dataset(num_hops: int, walks: dict[str, Any], **_: Any) -> dict[str, Any]:
    """``hops_documents`` as lm-evaluation-harness takes them (``custom_dataset``).

    Args:
        num_hops: Of every walk.
        walks: Fields of ``HopsConfig``, those that the model was trained on.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list(hops_documents(Walks(HopsConfig(**walks)), num_hops))}
