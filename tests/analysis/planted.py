"""Models of walks whose loops do what is known, without training.

The answer is computed at the last token, from the e of all tokens. e holds each token as a one-hot
vector; h holds a logit per entity, and in the channel after them the number of loops run.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from openmythos.analysis.pairs import Pairs, puzzle_pairs
from openmythos.config import GQAConfig, ModelConfig, SwiGLUConfig
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.model.recurrent import RecurrentDepthLM

WALKS = Walks(HopsConfig())
HOPS = 4  # a column for the start and each relation but the last: as many loops
LOGIT = 4.0


def planted_pairs(num_examples: int = 60, seed: int = 0) -> Pairs:
    return puzzle_pairs(WALKS, HOPS, num_examples, seed)


class Planted(RecurrentDepthLM):
    """The parts that all have in common."""

    def __init__(self) -> None:
        self.num_entities = WALKS.config.num_entities
        super().__init__(
            ModelConfig(
                vocab_size=WALKS.vocab_size,
                d_model=WALKS.vocab_size,
                num_prelude_layers=0,
                num_core_layers=1,
                num_coda_layers=0,
                num_loops=HOPS,
                max_seq_len=64,
                attention=GQAConfig(num_heads=1, num_kv_heads=1, head_dim=2),
                feed_forward=SwiGLUConfig(d_ff=2),
            )
        )
        table = torch.from_numpy(WALKS.relations)
        self.relations = functional.one_hot(table, self.num_entities).float()
        self.eval()

    def encode(self, tokens: Tensor, ctx: Any) -> Tensor:
        return functional.one_hot(tokens, WALKS.vocab_size).float()

    def init_state(self, e: Tensor, ctx: Any) -> Tensor:
        return torch.zeros_like(e)

    def decode(self, h: Tensor, ctx: Any) -> Tensor:
        rest = WALKS.vocab_size - self.num_entities
        return functional.pad(h[..., : self.num_entities], (0, rest))

    def follow(self, entities: Tensor, relation: Tensor) -> Tensor:
        """The logits of the entities after a relation, given as a one-hot token."""
        kinds = relation[:, self.num_entities :]
        return torch.einsum("be,br,ref->bf", entities, kinds, self.relations)

    def answer(self, e: Tensor) -> Tensor:
        entities = LOGIT * e[:, 0, : self.num_entities]
        for column in range(1, e.shape[1]):
            entities = self.follow(entities, e[:, column])
        return entities

    def state(self, h: Tensor, entities: Tensor) -> Tensor:
        """The next state: these logits at the last token, and one loop more."""
        after = h.clone()
        after[:, -1, : self.num_entities] = entities
        after[..., self.num_entities] += 1
        return after

    def loop_of(self, h: Tensor, loop_idx: Tensor) -> Tensor:
        """Each row's loop, as the state counts it."""
        return h[:, -1, self.num_entities].round().long()


class Relay(Planted):
    """The first loop reads the start, each one after it follows the next relation.

    The last also follows the last token's relation, which has no column.
    """

    def step(self, h: Tensor, e: Tensor, loop_idx: Tensor, ctx: Any) -> Tensor:
        loop, last = self.loop_of(h, loop_idx), e.shape[1] - 2
        token = e[torch.arange(len(e)), loop.clamp(max=last)]
        held = h[:, -1, : self.num_entities]
        start, entities = LOGIT * token[:, : self.num_entities], self.follow(held, token)
        entities = torch.where((loop == 0)[:, None], start, entities)
        ended = self.follow(entities, e[:, -1])
        entities = torch.where((loop == last)[:, None], ended, entities)
        return self.state(h, torch.where((loop > last)[:, None], held, entities))


class IndexedRelay(Relay):
    """The relay, whose loops differ by their number and not by the state."""

    def loop_of(self, h: Tensor, loop_idx: Tensor) -> Tensor:
        return loop_idx


class Average(Planted):
    """Every loop adds the same share of the whole answer."""

    def step(self, h: Tensor, e: Tensor, loop_idx: Tensor, ctx: Any) -> Tensor:
        return self.state(h, h[:, -1, : self.num_entities] + self.answer(e) / HOPS)


class OneShot(Planted):
    """The first loop does everything; the others keep it."""

    def step(self, h: Tensor, e: Tensor, loop_idx: Tensor, ctx: Any) -> Tensor:
        first = (self.loop_of(h, loop_idx) == 0)[:, None]
        return self.state(h, torch.where(first, self.answer(e), h[:, -1, : self.num_entities]))
