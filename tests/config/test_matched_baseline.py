import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import openmythos
from openmythos.config import (
    ACTConfig,
    DepthAttentionConfig,
    LearnedLoopConfig,
    LinearInjectionConfig,
    ModelConfig,
    MoEConfig,
    NormalInitConfig,
    ReLUSquaredConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
    counts,
)
from openmythos.config.matched_baseline import MATCHES, baseline, plain_model
from openmythos.config.model import LOOP_ONLY
from openmythos.config.presets import PRESETS, preset
from openmythos.config.schema import from_dict, to_dict
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import (
    MOE,
    Json,
    model_fields,
    random_model,
    random_tokens,
    small_config,
    unchecked,
)

LOOP_FIELDS = (*LOOP_ONLY, "num_core_layers", "value_embedding", "final_norm")


def size(config: ModelConfig, match: str, context: int) -> int:
    """What is compared, by the public counts."""
    figures = counts.count(config, context_length=context)
    if match == "parameters":
        return figures.total_params
    if match == "flops":
        return figures.inference_flops_per_token
    return 2 * figures.total_params + context * figures.kv_bytes_per_token


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("match", MATCHES)
def test_every_preset_is_matched_within_two_percent(name: str, match: str) -> None:
    config = preset(name)
    found = baseline(config, match=match)
    assert found.context_length == config.max_seq_len
    assert found.target == size(config, match, config.max_seq_len)
    assert found.value == size(found.config, match, config.max_seq_len)
    assert found.deviation == (found.value - found.target) / found.target
    assert abs(found.deviation) < 0.02
    assert found.config.num_loops == 1
    assert found.config.effective_depth() == found.config.num_layers


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("match", MATCHES)
def test_only_what_is_said_changes(name: str, match: str) -> None:
    old, new = to_dict(preset(name)), to_dict(baseline(preset(name), match=match).config)
    changed = {field for field in old if old[field] != new[field]}
    widths = {"feed_forward"} if old["core_feed_forward"] is None else {"core_feed_forward"}
    assert changed <= {*LOOP_FIELDS, *widths}
    for field in widths & changed:
        differs = {key for key in old[field] if old[field][key] != new[field][key]}
        assert differs <= {"d_ff", "d_expert", "bias_loops"}


@pytest.mark.parametrize("match", MATCHES)
def test_a_plain_model_is_its_own_baseline(match: str) -> None:
    config = preset("parcae-gpt-140m")
    found = baseline(config, match=match)
    assert (found.config, found.deviation) == (config, 0.0)


def test_equal_compute_of_parcae_is_the_unrolled_model() -> None:
    """8 loops of 2 layers are 16 layers, of which those with a table repeat the core's pattern."""
    found = baseline(preset("parcae-140m"), match="flops").config
    assert (found.num_prelude_layers, found.num_core_layers, found.num_coda_layers) == (2, 16, 2)
    assert found.value_embedding is not None
    assert found.value_embedding.layers == tuple(range(1, 20, 2))


def test_value_embeddings_repeat_the_cores_pattern() -> None:
    table = ValueEmbeddingConfig(layers=(0, 2, 4), gate_channels=8)
    config = small_config(num_core_layers=3, num_loops=2, value_embedding=table)
    found = baseline(config, match="flops").config
    assert found.num_core_layers == 6
    assert found.value_embedding is not None
    assert found.value_embedding.layers == (0, 2, 5, 7)
    none = small_config(num_core_layers=2, num_prelude_layers=0, num_coda_layers=0)
    assert baseline(none, match="flops").config.value_embedding is None


def test_all_that_only_a_loop_needs_is_gone() -> None:
    config = small_config(
        injection=LinearInjectionConfig(),
        state_init=NormalInitConfig(),
        loop_embedding=LearnedLoopConfig(num_loops=4),
        loop_adapter=WeightLoRAConfig(rank=2, num_loops=4),
        depth_attention=DepthAttentionConfig(num_recent_loops=3),
        halting=ACTConfig(),
        readout="linear",
        loop_norm=True,
        final_norm=False,
    )
    plain = baseline(config, match="parameters").config
    assert plain.injection.kind == "none" and plain.state_init.kind == "copy"
    assert plain.loop_embedding is plain.loop_adapter is plain.halting is None
    assert plain.depth_attention is None
    assert (plain.readout, plain.loop_norm, plain.prelude_norm) == ("none", False, False)
    assert plain.final_norm  # the loop's norm stood before the head


def test_the_width_that_changes_is_the_cores() -> None:
    sparse = baseline(small_config(core_feed_forward=MOE), match="parameters").config
    assert isinstance(sparse.core_ff, MoEConfig)
    assert sparse.core_ff.num_experts == MOE.num_experts
    assert sparse.feed_forward == small_config().feed_forward
    wide = ReLUSquaredConfig(d_ff=64, scale=0.5)
    dense = baseline(small_config(core_feed_forward=wide), match="memory").config
    assert isinstance(dense.core_ff, ReLUSquaredConfig) and dense.core_ff.scale == 0.5
    assert dense.feed_forward == small_config().feed_forward


def test_depth_and_context_set_the_target() -> None:
    config = preset("parcae-140m")
    short = baseline(config, match="memory", context_length=1)
    whole = baseline(config, match="memory")
    assert short.target < whole.target
    assert short.config.num_core_layers < whole.config.num_core_layers
    parameters = baseline(config, match="parameters", context_length=1)
    assert parameters.config == baseline(config, match="parameters").config


def test_the_plain_model_has_the_parameters_that_are_said_and_runs() -> None:
    found = baseline(small_config(), match="flops")
    model = random_model(found.config)
    assert sum(p.numel() for p in model.parameters()) == counts.total_params(found.config)
    logits = model(random_tokens(found.config, 2, 5)).logits
    assert logits.isfinite().all()


@settings(max_examples=8)
@given(model_fields())
def test_no_other_number_of_layers_is_nearer(fields: Json) -> None:
    config = from_dict(ModelConfig, fields)
    for match in MATCHES:
        found = baseline(config, match=match)
        with torch.device("meta"):
            RecurrentDepthLM(found.config)
        distance = abs(found.value - found.target)
        for number in range(1, 9):
            other = size(plain_model(config, number), match, found.context_length)
            assert abs(other - found.target) >= distance


def test_bad_words_are_refused() -> None:
    message = "match is 'size'; it must be one of 'parameters', 'flops', 'memory'"
    with unchecked(), pytest.raises(ValueError, match=message):
        baseline(preset("tiny"), match="size")  # type: ignore[arg-type]
    for context in (0, 5000):
        with pytest.raises(ValueError, match=rf"context_length is {context}; .* in 1\.\.1024"):
            baseline(preset("tiny"), match="flops", context_length=context)
    wrong = (True, 7.0, "7", b"7", 10**30, torch.tensor([7, 7]), [7])
    for context in wrong:
        said = r"^context_length is .*; it must be an integer in 1\.\.1024$"
        with unchecked(), pytest.raises(ValueError, match=said):
            baseline(preset("tiny"), match="flops", context_length=context)
    with unchecked():
        found = baseline(preset("tiny"), match="memory", context_length=np.int64(7))
    assert found.context_length == 7 and type(found.context_length) is int


def test_public_name_without_torch() -> None:
    assert openmythos.baseline is baseline
    code = (
        "import sys, openmythos as om; om.baseline(om.preset('mythos-1t'), match='flops'); "
        "om.baseline(om.preset('mythos-1t'), match='memory'); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
