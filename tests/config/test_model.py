import dataclasses
import json
import typing

import pytest
from hypothesis import given, settings

from openmythos.config import (
    AttentionConfig,
    BlockConfig,
    CopyInitConfig,
    DepthAttentionConfig,
    ExitGateConfig,
    FeedForwardConfig,
    GateInjectionConfig,
    HaltingConfig,
    InjectionConfig,
    LearnedLoopConfig,
    LinearInjectionConfig,
    LoopAdapterConfig,
    LoopEmbeddingConfig,
    ModelConfig,
    MoEConfig,
    NoInjectionConfig,
    OutputLoRAConfig,
    RopeConfig,
    SinusoidalLoopConfig,
    StateInitConfig,
    ValueEmbeddingConfig,
    ZerosInitConfig,
)
from openmythos.config.model import KEPT_UNLOOPED, LOOP_ONLY
from openmythos.config.schema import apply_overrides, from_dict, to_dict
from tests.strategies import GQA, MLA, MOE, model_fields, small_config, unchecked


@settings(max_examples=60)
@given(model_fields())
def test_json_round_trip_of_random_configs(fields):
    config = from_dict(ModelConfig, fields)
    text = json.dumps(to_dict(config))
    assert from_dict(ModelConfig, json.loads(text)) == config
    assert apply_overrides(config, []) == config
    assert hash(config) == hash(apply_overrides(config, []))


def test_a_saved_config_is_readable(tmp_path):
    path = tmp_path / "config.json"
    config = small_config(core_feed_forward=MOE, attention=MLA)
    path.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    assert from_dict(ModelConfig, json.loads(path.read_text(encoding="utf-8"))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"injection": NoInjectionConfig(), "state_init": ZerosInitConfig()},
            "state_init.kind is 'zeros'; it must be 'copy' with injection 'none'",
        ),
        (
            {
                "injection": GateInjectionConfig(add_e=False),
                "state_init": ZerosInitConfig(),
            },
            "state_init.kind is 'zeros'; it must be 'copy' with injection 'gate' and add_e=false",
        ),
        (
            {"depth_attention": DepthAttentionConfig(num_recent_loops=2), "attention": MLA},
            "attention.kind is 'mla'; it must be 'gqa' with depth_attention",
        ),
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"num_core_layers": 0}, "num_core_layers is 0; it must be at least 1"),
        ({"num_loops": 0}, "num_loops is 0; it must be at least 1"),
        ({"num_loops": 1_000_001}, "num_loops is 1000001; it must be at most 1000000"),
        ({"num_coda_layers": -1}, "num_coda_layers is -1; it must be an integer of at least 0"),
        (
            {"readout": "norm"},
            "readout is 'norm'; it must be one of 'none', 'linear', 'final_norm'",
        ),
        (
            {"readout": "final_norm", "final_norm": False},
            "final_norm is False; it must be true when readout is 'final_norm'",
        ),
        (
            {"loop_embedding": SinusoidalLoopConfig(num_channels=17)},
            r"loop_embedding.num_channels is 17; it must be in 1\.\.16",
        ),
        (
            {"value_embedding": ValueEmbeddingConfig(layers=(4,), gate_channels=8)},
            r"value_embedding.layers is 4; it must be in 0\.\.3",
        ),
        (
            {"value_embedding": ValueEmbeddingConfig(layers=(0,))},
            r"value_embedding.gate_channels is 32; it must be in 1\.\.16",
        ),
        (
            {
                "value_embedding": ValueEmbeddingConfig(layers=(0,), gate_channels=8),
                "attention": MLA,
            },
            "attention.kind is 'mla'; it must be 'gqa' here",
        ),
    ],
)
def test_bad_fields_are_named_in_one_line(changes, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        small_config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            BlockConfig,
            {"norm": "post"},
            "norm is 'post'; it must be one of 'pre', 'peri', 'sandwich'",
        ),
        (BlockConfig, {"norm_eps": 0.0}, "block.norm_eps is 0.0; it must be above 0"),
        (DepthAttentionConfig, {"num_recent_loops": 0}, "num_recent_loops is 0; it must be at lea"),
    ],
)
def test_bad_fields_of_a_part_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_an_odd_rotary_dimension_needs_no_rope():
    odd = {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 5}
    data = {**to_dict(small_config()), "attention": odd}
    with pytest.raises(ValueError, match="rotary dimension is 5; it must be even"):
        from_dict(ModelConfig, data)
    assert from_dict(ModelConfig, {**data, "rope": None}).rope is None


def test_derived_numbers():
    config = small_config(num_prelude_layers=2, num_core_layers=3, num_coda_layers=1, num_loops=4)
    assert config.num_layers == 6
    assert config.effective_depth() == 2 + 3 * 4 + 1
    assert config.effective_depth(1) == 6
    assert config.core_ff is config.feed_forward
    assert isinstance(small_config(core_feed_forward=MOE).core_ff, MoEConfig)
    depth = DepthAttentionConfig(num_recent_loops=3)
    assert (config.num_recent_loops, small_config(depth_attention=depth).num_recent_loops) == (0, 3)


def test_every_field_is_kept_or_dropped_without_a_loop():
    """A new field of the model's config fails here until ``unlooped`` says what becomes of it."""
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    assert sorted([*KEPT_UNLOOPED, *LOOP_ONLY]) == sorted(names)


def test_unlooped_is_without_what_only_a_loop_needs():
    looped = small_config(
        core_feed_forward=dataclasses.replace(MOE, bias_loops=3),
        injection=LinearInjectionConfig(),
        loop_embedding=LearnedLoopConfig(num_loops=4),
        loop_adapter=OutputLoRAConfig(rank=2, num_loops=4),
        depth_attention=DepthAttentionConfig(num_recent_loops=3),
        halting=ExitGateConfig(),
        value_embedding=ValueEmbeddingConfig(layers=(0, 2), gate_channels=8),
        loop_norm=True,
        readout="linear",
        final_norm=False,
    )
    plain = looped.unlooped()
    before, after = to_dict(looped), to_dict(plain)
    assert [name for name in LOOP_ONLY if before[name] == after[name]] == []
    changed = {name for name in KEPT_UNLOOPED if before[name] != after[name]}
    assert changed == {"core_feed_forward", "final_norm"}
    assert plain.core_ff == MOE
    assert plain.final_norm  # the loop's norm stood before the head
    assert plain.unlooped() == plain
    assert not small_config(final_norm=False).unlooped().final_norm


def test_how_the_tokens_reach_the_state():
    copied = {"state_init": CopyInitConfig()}
    gate, silent = GateInjectionConfig(), GateInjectionConfig(add_e=False)
    assert small_config().adds_e
    assert small_config(injection=gate).adds_e
    assert not small_config(injection=silent, **copied).adds_e
    assert not small_config(injection=NoInjectionConfig(), **copied).adds_e


def test_overrides_of_a_model():
    config = small_config()
    changed = apply_overrides(
        config,
        [
            "d_model=32",
            "attention.num_kv_heads=4",
            "injection=gate",
            "rope.theta=5e5",
            "block.norm=peri",
        ],
    )
    assert changed.d_model == 32
    assert changed.attention.num_kv_heads == 4
    assert changed.injection.kind == "gate"
    assert changed.rope == RopeConfig(theta=500_000.0)
    assert changed.block == BlockConfig(norm="peri")
    assert config == small_config()
    assert config.attention == GQA


UNIONS = [
    AttentionConfig,
    FeedForwardConfig,
    InjectionConfig,
    StateInitConfig,
    LoopEmbeddingConfig,
    LoopAdapterConfig,
    HaltingConfig,
]


@pytest.mark.parametrize("union", UNIONS)
def test_members_of_a_union_have_different_kinds_and_are_frozen(union):
    members = typing.get_args(union)
    assert len({member.kind for member in members}) == len(members)
    for member in members:
        assert member.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(member))
        assert member.__doc__
