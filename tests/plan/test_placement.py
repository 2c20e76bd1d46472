import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmythos.config import ModelConfig, counts
from openmythos.config.parallel import ParallelConfig
from openmythos.config.presets import PRESETS, preset
from openmythos.plan.placement import check_layout, local_shapes, place, units
from tests.strategies import MLA, MOE, small_config

GIB = 2**30
EP = ParallelConfig(dp_shard=1024, ep=128)
EP_TP = ParallelConfig(dp_shard=128, ep=128, tp=8)


def float32_gib(config: ModelConfig, layout: ParallelConfig, rank: int) -> float:
    return 4 * sum(map(math.prod, local_shapes(config, layout, rank).values())) / GIB


def test_whole_experts_are_spread_evenly_and_plain_shards_are_not() -> None:
    config = preset("mythos-1t")
    assert [round(float32_gib(config, EP, rank), 2) for rank in (0, 1023)] == [3.67, 3.66]
    plain = ParallelConfig(dp_shard=1024)
    assert [round(float32_gib(config, plain, rank), 2) for rank in (0, 1023)] == [9.65, 0.07]
    mean = 4 * counts.total_params(config) / 1024 / GIB
    assert round(mean, 2) == 3.67  # which hides it


def test_a_layout_by_a_formula_by_hand() -> None:
    """mythos-1t over 1,024 ranks with EP 128, rank 700, by hand."""
    d, rows, attention = 12_288, lambda n: -(-n // 1024), 0

    def cut(n: int, width: int) -> int:
        """Rows of a matrix of n rows that rank 700 has, times its width."""
        chunk = rows(n)
        return width * max(0, min(chunk, n - 700 * chunk))

    for n, width in ((2112, d), (96 * 192, 1536), (96 * 256, 512), (d, 96 * 128)):
        attention += cut(n, width)
    attention += cut(1536, 1) + cut(512, 1) + 2 * cut(d, 1)
    dense = cut(2 * 36_864, d) + cut(d, 36_864)
    shared = cut(2 * 4352, d) + cut(d, 4352)
    experts = 3 * (2 * 4352 // 8 * d + d // 8 * 4352)  # 384 / 128 experts, an eighth of each
    outside = 2 * cut(163_840, d) + cut(d, d) + 4 * cut(d, 1)
    expected = 24 * attention + 8 * dense + 16 * (shared + experts + cut(384, d)) + outside
    shapes = local_shapes(preset("mythos-1t"), EP, 700)
    assert sum(map(math.prod, shapes.values())) == expected
    assert shapes["core.3.feed_forward.gate_up"] == (3, 1088, d)
    assert shapes["core.3.feed_forward.router.weight"] == (0, d)


LAYOUTS = st.builds(
    lambda efsdp, ep, tp, copies: ParallelConfig(
        dp_replicate=copies, dp_shard=efsdp * ep, ep=ep, tp=tp
    ),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
)


@given(LAYOUTS)
def test_shards_of_all_ranks_make_up_the_parameters(layout: ParallelConfig) -> None:
    moe = replace(MOE, d_expert=12)
    config = small_config(d_model=24, attention=MLA, core_feed_forward=moe)
    check_layout(config, layout)
    whole = counts.parameter_shapes(config)
    ranks = [local_shapes(config, layout, rank) for rank in range(layout.num_ranks)]
    for each in place(config, layout):
        copies = layout.dp_replicate
        if not each.is_expert:  # what tensor parallel does not divide is whole on its ranks
            copies *= layout.tp * math.prod(each.shape) // math.prod(whole[each.name])
        held = sum(math.prod(rank[each.name]) for rank in ranks)
        assert held == copies * math.prod(whole[each.name]), each.name
        assert max(math.prod(rank[each.name]) for rank in ranks) == each.stored
    gathered = sum(unit.gathered for unit in units(config, layout))
    assert gathered == sum(math.prod(each.shape) for each in place(config, layout))


@pytest.mark.parametrize("name", PRESETS)
def test_one_rank_holds_everything(name: str) -> None:
    config = preset(name)
    assert local_shapes(config, ParallelConfig(), 0) == counts.parameter_shapes(config)
    names = [unit.name for unit in units(config, ParallelConfig())]
    blocks = [name for name in names if name.count(".") == 1 and name != "halting.proj"]
    assert len(blocks) == config.num_layers and len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            ParallelConfig(dp_shard=3, ep=3),
            "num_experts is 4; it must be a multiple of parallel.ep=3",
        ),
        (ParallelConfig(tp=5), "num_heads is 2; it must be a multiple of parallel.tp=5"),
        (ParallelConfig(dp_shard=14, ep=2), "has 16 channels per expert, which 7 ranks"),
    ],
)
def test_what_does_not_divide_is_refused(layout: ParallelConfig, said: str) -> None:
    config = small_config(attention=MLA, core_feed_forward=MOE)
    with pytest.raises(ValueError, match=said):
        check_layout(config, layout)


def test_experts_are_needed_for_their_division() -> None:
    with pytest.raises(ValueError, match="the model has no experts: set it to 1"):
        check_layout(small_config(), ParallelConfig(dp_shard=2, ep=2))
