"""The ``hops`` task as text for evaluators: ``e3 r1 r0`` -> ``e7``.

Each word is one token id of ``data.synthetic``: entities e0, e1 ... first, then relations r0, r1
... There are no special tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from openmythos.data.synthetic import HopsConfig, Walks

NUM_WALKS, WALK_SEED = 512, 1  # as in the demo's grid


class WalkCodec:
    """Words of walks to token ids and back.

    Attributes:
        walks: The walks themselves.
        words: The word of each id.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    begin_ids: tuple[int, ...] = ()
    end_ids: frozenset[int] = frozenset()
    chat_template: None = None
    generation: Mapping[str, Any] = {}
    sampling: Mapping[str, Any] = {}

    def __init__(self, walks: Walks) -> None:
        self.walks = walks
        entities = [f"e{number}" for number in range(walks.config.num_entities)]
        self.words = [*entities, *(f"r{number}" for number in range(walks.config.num_relations))]
        self._ids = {word: index for index, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, one for each word."""
        return len(self.words)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of words separated by white space; there are no special tokens.

        Raises:
            ValueError: A word is neither an entity nor a relation.
        """
        words = text.split()
        for word in words:
            if word not in self._ids:
                raise ValueError(f"{word!r} is no word of a walk; {self._form}")
        return [self._ids[word] for word in words]

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a walk; nothing is put before it.

        Raises:
            ValueError: There is no word, or one that is none of a walk.
        """
        if not text.strip():
            raise ValueError(f"there is no walk; {self._form}")
        return self.encode(text)

    @property
    def _form(self) -> str:
        last_entity = self.walks.config.num_entities - 1
        return (
            f"a walk is a start, e0 to e{last_entity}, and relations, r0 to {self.words[-1]}, "
            "such as e3 r1 r0"
        )

    def require_lossless(self, purpose: str) -> None:
        """Nothing: words come back as they are, but for the white space between them."""

    def decode(self, ids: Iterable[int]) -> str:
        """The words, separated by spaces."""
        return " ".join(self.words[index] for index in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The words as a continuation: each with a space before it."""
        return "".join(f" {self.words[index]}" for index in ids).encode()


def hops_documents(
    walks: Walks, num_hops: int, size: int = NUM_WALKS, seed: int = WALK_SEED
) -> list[dict[str, str]]:
    """Held-out walks of exactly ``num_hops`` hops: ``context`` and ``target``.

    The target is the answer, or what the walk passes and the answer if walks are written out.
    """
    batch, codec = walks.held_out_batch(num_hops, size, seed), WalkCodec(walks)
    asked, said = batch.tokens[:, : num_hops + 1].tolist(), batch.targets[:, num_hops:].tolist()
    return [
        {"context": codec.decode(walk), "target": " " + codec.decode(entities)}
        for walk, entities in zip(asked, said, strict=True)
    ]


def hops_dataset(num_hops: int, walks: dict[str, Any], **_: Any) -> dict[str, Any]:
    """``hops_documents`` in lm-evaluation-harness' format (``custom_dataset``).

    Args:
        num_hops: Hops per walk.
        walks: The fields of the ``HopsConfig`` that the model was trained on.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list(hops_documents(Walks(HopsConfig(**walks)), num_hops))}
