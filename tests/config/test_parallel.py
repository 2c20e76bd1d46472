"""What a layout over processes refuses."""

from dataclasses import replace
from typing import Any

import pytest

from openmythos.config import DepthAttentionConfig, ReLUSquaredConfig
from openmythos.config.parallel import ParallelConfig
from openmythos.config.schema import from_dict, to_dict
from tests.strategies import GQA, MLA, MOE, small_config


def test_ranks_of_a_layout() -> None:
    layout = ParallelConfig(dp_replicate=2, dp_shard=4)
    assert (layout.num_ranks, layout.num_row_ranks) == (8, 8)
    assert ParallelConfig().num_ranks == 1
    assert from_dict(ParallelConfig, to_dict(layout)) == layout


def test_only_ranks_that_exchange_in_a_loop_run_the_same_loops() -> None:
    assert not ParallelConfig(dp_shard=4).same_loops
    assert ParallelConfig(dp_shard=4, core_gather="loop").same_loops
    assert not ParallelConfig(core_gather="loop").same_loops


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dp_shard": 0}, "dp_shard is 0; it must be at least 1"),
        ({"dp_shard": 4, "ep": 3}, "ep is 3; it must be a divisor of parallel.dp_shard=4"),
        ({"core_gather": "never"}, "core_gather is 'never'; allowed: 'step', 'loop'"),
    ],
)
def test_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_dict(ParallelConfig, given)


EP = ParallelConfig(dp_shard=8, ep=8)
FOUR_HEADS: dict[str, Any] = {"attention": replace(GQA, num_kv_heads=4)}


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        (EP, {}, "parallel.ep is 8, and the model has no experts"),
        (EP, {"core_feed_forward": MOE}, "num_experts is 4; it must be a multiple of parallel.ep"),
        (ParallelConfig(tp=4), {"attention": GQA}, "attention.num_kv_heads is 2; .*parallel.tp=4"),
        (
            ParallelConfig(tp=4),
            {"attention": replace(GQA, num_heads=6, num_kv_heads=3)},
            "attention.num_heads is 6",
        ),
        (ParallelConfig(tp=4), {"attention": MLA}, "attention.num_heads is 2"),
        (
            ParallelConfig(tp=4),
            {"feed_forward": ReLUSquaredConfig(d_ff=18)},
            "model.feed_forward.d_ff is 18",
        ),
        (
            ParallelConfig(tp=4),
            {"core_feed_forward": replace(MOE, num_shared_experts=1, d_shared=6)},
            "model.core_feed_forward's shared experts is 6",
        ),
        (
            ParallelConfig(tp=4),
            {"depth_attention": DepthAttentionConfig(num_recent_loops=1)},
            "parallel.tp is 4, and model.depth_attention cannot be divided",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(
    layout: ParallelConfig, changes: dict[str, Any], said: str
) -> None:
    config = small_config(**{**FOUR_HEADS, **changes})
    ParallelConfig(dp_shard=8).check(config)
    with pytest.raises(ValueError, match=said) as error:
        layout.check(config)
    assert "\n" not in str(error.value)
    ParallelConfig(dp_shard=4, ep=4, tp=4).check(
        small_config(**FOUR_HEADS, core_feed_forward=replace(MOE, num_shared_experts=1))
    )
