"""What tensor parallelism needs no ranks for; ``ranks_expert`` has the rest."""

import torch

from openmythos.model.attention import ATTENTIONS
from openmythos.model.feedforward import FEED_FORWARDS
from openmythos.train.tensor import DIVISIONS, order_of


def test_every_attention_and_feed_forward_has_a_division() -> None:
    assert {*ATTENTIONS.values(), *FEED_FORWARDS.values()} == {*DIVISIONS}


def test_each_part_of_a_fused_matrix_is_divided_by_itself() -> None:
    gate, up = range(4), range(4, 8)
    first, second = order_of((4, 4), 2).chunk(2)
    assert first.tolist() == [*gate[:2], *up[:2]]
    assert second.tolist() == [*gate[2:], *up[2:]]
    queries, keys, values = (0, 1, 2, 3), (4, 5), (6, 7)
    first, second = order_of((4, 2, 2), 2).chunk(2)
    assert first.tolist() == [*queries[:2], keys[0], values[0]]
    assert second.tolist() == [*queries[2:], keys[1], values[1]]
    assert torch.equal(order_of((6,), 3), torch.arange(6))
