"""What tensor parallelism needs no ranks for; ``ranks_expert`` has the rest."""

from dataclasses import replace

import pytest
import torch

from openmythos.config import DepthAttentionConfig, ReLUSquaredConfig
from openmythos.model.attention import ATTENTIONS
from openmythos.model.feedforward import FEED_FORWARDS
from openmythos.train.tensor import DIVISIONS, check_tensor_parallel, order_of
from tests.strategies import GQA, MLA, MOE, small_config


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": GQA}, "attention.num_kv_heads is 2"),
        ({"attention": replace(GQA, num_heads=6, num_kv_heads=3)}, "attention.num_heads is 6"),
        ({"attention": MLA}, "attention.num_heads is 2"),
        ({"feed_forward": ReLUSquaredConfig(d_ff=18)}, "feed_forward.d_ff is 18"),
        ({"core_feed_forward": replace(MOE, num_shared_experts=1, d_shared=6)}, "shared"),
        ({"depth_attention": DepthAttentionConfig(num_recent_loops=1)}, "depth_attention"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, object], said: str) -> None:
    whole = {"attention": replace(GQA, num_kv_heads=4)}
    config = small_config(**{**whole, **changes})
    check_tensor_parallel(config, 1)
    with pytest.raises(ValueError, match=said) as error:
        check_tensor_parallel(config, 4)
    assert "tp=4" in str(error.value) and "\n" not in str(error.value)
    check_tensor_parallel(small_config(**whole), 4)
