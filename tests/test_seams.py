import dataclasses
import typing

import pytest

from openmythos import seams
from openmythos.seams import (
    ACTConfig,
    GQAConfig,
    LearnedLoopConfig,
    LTIInjectionConfig,
    MLAConfig,
    MoEConfig,
    OutputLoRAConfig,
    ReLUSquaredConfig,
    RopeConfig,
    SwiGLUConfig,
    UniversalACTConfig,
    WeightLoRAConfig,
)
from tests.strategies import unchecked

UNIONS = [
    seams.AttentionConfig,
    seams.FeedForwardConfig,
    seams.InjectionConfig,
    seams.StateInitConfig,
    seams.LoopEmbeddingConfig,
    seams.LoopAdapterConfig,
    seams.HaltingConfig,
]
GQA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
MLA = {
    "num_heads": 2,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}
MOE = {"num_experts": 4, "num_experts_per_token": 2, "d_expert": 8}


@pytest.mark.parametrize("union", UNIONS)
def test_members_of_a_union_have_different_kinds_and_are_frozen(union):
    members = typing.get_args(union)
    assert len({member.kind for member in members}) == len(members)
    for member in members:
        assert member.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(member))
        assert member.__doc__


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GQAConfig, {**GQA, "num_heads": 0}, "num_heads is 0; it must be at least 1"),
        (
            GQAConfig,
            {**GQA, "num_kv_heads": 3},
            "num_kv_heads is 3; it must be a divisor of num_heads=4",
        ),
        (
            GQAConfig,
            {**GQA, "qk_norm": "wieghted"},
            "qk_norm is 'wieghted'; it must be one of 'none', ",
        ),
        (GQAConfig, {**GQA, "qk_norm_eps": 0.0}, "qk_norm_eps is 0.0; it must be above 0, or null"),
        (MLAConfig, {**MLA, "v_head_dim": -1}, "v_head_dim is -1; it must be at least 1"),
        (RopeConfig, {"theta": 1.0}, "rope.theta is 1.0; it must be above 1"),
        (SwiGLUConfig, {"d_ff": 0}, "d_ff is 0; it must be at least 1"),
        (ReLUSquaredConfig, {"d_ff": 0}, "d_ff is 0; it must be at least 1"),
        (
            MoEConfig,
            {**MOE, "num_experts_per_token": 5},
            "num_experts_per_token is 5; it must be at most",
        ),
        (MoEConfig, {**MOE, "num_shared_experts": -1}, "num_shared_experts is -1; it must be >= 0"),
        (MoEConfig, {**MOE, "bias_loops": 0}, "bias_loops is 0; it must be at least 1"),
        (
            MoEConfig,
            {**MOE, "scoring": "tanh"},
            "scoring is 'tanh'; it must be one of 'sigmoid', 'softmax'",
        ),
        (LTIInjectionConfig, {"decay_init": 1.0}, r"decay_init is 1.0; it must be in \(0, 1\)"),
        (ACTConfig, {"threshold": 0.0}, r"halting.threshold is 0.0; it must be in \(0, 1\]"),
        (
            UniversalACTConfig,
            {"threshold": 2.0},
            r"halting.threshold is 2.0; it must be in \(0, 1\]",
        ),
        (
            UniversalACTConfig,
            {"readout": "sum"},
            "readout is 'sum'; it must be one of 'basic', 'accumulated'",
        ),
        (LearnedLoopConfig, {"num_loops": 0}, "num_loops is 0; it must be at least 1"),
        (WeightLoRAConfig, {"rank": 0, "num_loops": 1}, "rank is 0; it must be at least 1"),
        (OutputLoRAConfig, {"rank": 1, "num_loops": 0}, "num_loops is 0; it must be at least 1"),
    ],
)
def test_bad_fields_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_what_is_cached():
    assert GQAConfig(**GQA).cache_shapes == ((2, 4), (2, 4))
    assert MLAConfig(**MLA).cache_shapes == ((1, 7),)
    assert (GQAConfig(**GQA).rope_dim, MLAConfig(**MLA).rope_dim) == (4, 2)


def test_width_of_a_shared_expert():
    assert MoEConfig(**MOE).shared_width == 8
    assert MoEConfig(**MOE, d_shared=3).shared_width == 3
