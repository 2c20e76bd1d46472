import json
import subprocess
import sys

import pytest
import torch

from openmythos.config import MLAConfig, ModelConfig, MoEConfig, counts
from openmythos.config.presets import PRESETS, preset
from openmythos.config.schema import from_dict, to_dict
from openmythos.model.recurrent import RecurrentDepthLM

NAMED = {
    "mythos-1b": 1e9,
    "mythos-3b": 3e9,
    "mythos-10b": 10e9,
    "mythos-50b": 50e9,
    "mythos-100b": 100e9,
    "mythos-500b": 500e9,
    "mythos-1t": 1e12,
    "kimi-scale-1t": 1e12,
}


def core_experts(config: ModelConfig) -> MoEConfig:
    assert isinstance(config.core_ff, MoEConfig)
    return config.core_ff


def latent_attention(config: ModelConfig) -> MLAConfig:
    assert isinstance(config.attention, MLAConfig)
    return config.attention


@pytest.mark.parametrize(("name", "size"), NAMED.items())
def test_total_is_within_two_percent_of_the_name(name: str, size: float) -> None:
    assert counts.total_params(preset(name)) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("name", NAMED)
def test_most_of_a_named_model_rests_for_each_token(name: str) -> None:
    config = preset(name)
    share = counts.active_params(config) / counts.total_params(config)
    assert 0.03 <= share <= (0.17 if NAMED[name] < 5e9 else 0.12)


@pytest.mark.parametrize("name", NAMED)
def test_experts_are_fine_and_few_are_shared(name: str) -> None:
    config = preset(name)
    experts = core_experts(config)
    assert experts.num_experts_per_token == 8
    assert experts.d_expert < config.d_model / 2
    assert experts.num_shared_experts * experts.shared_width <= 2 * experts.d_expert
    assert experts.bias_loops == config.num_loops
    assert experts.num_experts % 8 == 0  # divides over the devices of a node


@pytest.mark.parametrize("name", NAMED)
def test_a_layer_caches_one_latent_and_one_rotary_key(name: str) -> None:
    config = preset(name)
    attention = latent_attention(config)
    latent = attention.kv_lora_rank + attention.qk_rope_head_dim
    assert latent <= 576
    assert counts.kv_bytes_per_token(config) == config.effective_depth() * latent * 2


@pytest.mark.parametrize("name", NAMED)
def test_depth_is_that_of_a_model_one_could_train(name: str) -> None:
    assert 20 <= preset(name).effective_depth() <= 144


def test_active_compute_grows_with_the_name() -> None:
    family = [preset(name) for name in NAMED if name.startswith("mythos")]
    flops = [counts.forward_flops(config) for config in family]
    assert flops == sorted(flops)
    widths = [config.d_model for config in family]
    assert widths == sorted(widths)


def test_kimi_scale_has_the_published_layer() -> None:
    config = preset("kimi-scale-1t")
    experts, attention = core_experts(config), latent_attention(config)
    assert (config.d_model, config.num_layers, config.vocab_size) == (7168, 61, 163_840)
    assert (experts.num_experts, experts.num_shared_experts, experts.d_expert) == (384, 1, 2048)
    ranks = (attention.q_lora_rank, attention.kv_lora_rank)
    heads = (attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim)
    assert ranks + heads == (1536, 512, 128, 64, 128)
    assert counts.active_params(config) == pytest.approx(32e9, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert preset(name) == config


def test_unknown_name_is_told_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"no preset 'mythos-1x'; did you mean 'mythos-1") as error:
        preset("mythos-1x")
    assert all(name in str(error.value) for name in PRESETS)
    with pytest.raises(ValueError, match=r"no preset 'zzz'; allowed: tiny"):
        preset("zzz")


def test_tiny_runs() -> None:
    config = preset("tiny")
    assert counts.total_params(config) < 20e6
    model = RecurrentDepthLM(config).eval()
    with torch.no_grad():
        logits = model(torch.arange(6)[None]).logits
    assert logits.shape == (1, 6, config.vocab_size)
    assert bool(logits.isfinite().all())


def test_a_trillion_parameters_cost_nothing() -> None:
    code = (
        "import sys, openmythos as om; from openmythos.config import counts; "
        "print(counts.total_params(om.preset('mythos-1t')), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(counts.total_params(preset("mythos-1t"))), "False"]
