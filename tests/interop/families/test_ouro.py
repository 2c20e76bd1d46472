import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openmythos.config import ModelConfig, RopeConfig
from openmythos.config.presets import preset
from openmythos.config.schema import apply_overrides
from openmythos.engine.reference import generate
from openmythos.interop.families.ouro import FAMILY, exit_options, read_config, rules
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import Rename, export_config
from openmythos.model.exit import CumulativeThreshold
from openmythos.model.recurrent import RecurrentDepthLM
from tests.interop.families.examples import (
    cached_logits,
    check_generation,
    check_round_trip,
    check_same_bytes,
    exported,
)
from tests.strategies import random_model

GoldenDir = Callable[[str], Path]

# --- the golden -----------------------------------------------------------------------------------


@pytest.fixture
def golden(golden_dir: GoldenDir) -> Path:
    return golden_dir("ouro")


@pytest.fixture
def model(golden: Path) -> RecurrentDepthLM:
    return load_pretrained(golden)


@pytest.mark.parametrize("num_loops", [1, 2, 3, 4])
@torch.no_grad()
def test_logits_are_ouros(golden: Path, model: RecurrentDepthLM, num_loops: int) -> None:
    expected = load_file(golden / "io.safetensors")
    tokens, logits = expected["input_ids"], expected[f"logits_T{num_loops}"]
    assert (model(tokens, num_loops=num_loops).logits - logits).abs().max() < 1e-4
    found = cached_logits(model, tokens, num_loops, [9, 4] + [1] * 8)
    assert (found - logits).abs().max() < 1e-4


@torch.no_grad()
def test_the_final_norm_is_inside_the_loop_and_nowhere_else(
    golden: Path, model: RecurrentDepthLM
) -> None:
    """The states are normalised, and the head reads them as they are."""
    expected = load_file(golden / "io.safetensors")
    out = model(expected["input_ids"], num_loops=4, keep_states=True)
    for loop, state in enumerate(out.states, start=1):
        plain = state / model.loop_norm.weight
        assert torch.allclose(plain.square().mean(dim=-1), torch.ones(3, 21), atol=1e-3)
        logits = state @ model.head.weight.T
        assert (logits - expected[f"logits_T{loop}"]).abs().max() < 1e-4
    assert not any("final_norm" in name for name in model.state_dict())


@torch.no_grad()
def test_the_gate_and_its_distribution_are_ouros(golden: Path, model: RecurrentDepthLM) -> None:
    expected = load_file(golden / "io.safetensors")
    out = model(expected["input_ids"], num_loops=4, keep_states=True)
    lambdas = expected["gate_lambda"]
    found = torch.stack([model.halting(state) for state in out.states], dim=-1)
    assert (found - lambdas).abs().max() < 1e-5
    # p_t = lambda_t prod_{j<t} (1 - lambda_j), and the last loop takes what is left.
    left = (1 - lambdas).cumprod(dim=-1)
    before = torch.cat((torch.ones(3, 21, 1), left[..., :-1]), dim=-1)
    weights = torch.cat((lambdas[..., :-1] * before[..., :-1], before[..., -1:]), dim=-1)
    assert (out.exit_weights.permute(1, 2, 0) - weights).abs().max() < 1e-5
    assert (out.exit_weights.sum(dim=0) - 1).abs().max() < 1e-6


@torch.no_grad()
def test_the_threshold_chooses_the_state_that_ouro_reads(
    golden: Path, model: RecurrentDepthLM
) -> None:
    """By the rule itself, loop by loop, on all positions at once."""
    expected = load_file(golden / "io.safetensors")
    tokens = expected["input_ids"]
    for threshold, name in ((0.6, "logits_threshold_0.6"), (1.0, "logits_default")):
        rule = CumulativeThreshold(threshold=threshold)
        out = model(tokens, num_loops=4, keep_states=True)
        state = rule.start(out.states[0].flatten(0, 1))
        chosen, running = out.states[-1].clone(), torch.ones(3, 21, dtype=torch.bool)
        taken = torch.full((3, 21), 4)
        mass = out.exit_weights.cumsum(dim=0)
        for loop, h in enumerate(out.states):
            stop, state = rule.check(state, h.flatten(0, 1), mass=mass[loop].flatten())
            now = stop.view(3, 21) & running
            chosen[now], taken[now] = h[now], loop + 1
            running &= ~now
        found = model.decode(chosen, model.context(tokens))
        assert (found - expected[name]).abs().max() < 1e-4
        depths = {1, 2, 3, 4} if threshold == 0.6 else {4}
        assert set(taken.flatten().tolist()) == depths


def test_generation_stops_where_ouro_stops(golden: Path, model: RecurrentDepthLM) -> None:
    """Each position as the end of a prompt: the prompt is read in full, as all positions there."""
    expected = load_file(golden / "io.safetensors")
    tokens, logits = expected["input_ids"], expected["logits_threshold_0.6"]
    loops = set()
    for length in range(1, 22):
        result = generate(
            model,
            tokens[:, :length].tolist(),
            max_new_tokens=1,
            return_logits=True,
            **exit_options({"early_exit_threshold": 0.6}),
        )
        found = torch.stack([row[0] for row in result.logits])
        assert (found - logits[:, length - 1]).abs().max() < 1e-4
        loops |= {row[0] for row in result.loops}
    assert loops == {1, 2, 3, 4}


def test_early_exit_fields_become_arguments() -> None:
    assert exit_options({}) == {}
    assert exit_options({"early_exit_threshold": None}) == {}
    assert exit_options({"early_exit_threshold": 1.0, "early_exit_step": None}) == {}
    assert exit_options({"early_exit_threshold": 0.6}) == {
        "exit_rule": CumulativeThreshold(threshold=0.6)
    }
    assert exit_options({"early_exit_step": 1, "early_exit_threshold": 0.6}) == {"num_loops": 2}


def test_export_gives_the_same_bytes(golden: Path, model: RecurrentDepthLM) -> None:
    check_same_bytes(FAMILY, golden)
    stored = load_file(golden / "model.safetensors")
    found = rules(model.config)
    assert {name for rule in found for name in rule.theirs} == stored.keys()  # nothing is skipped
    assert {type(rule) for rule in found if len(rule.theirs) == 1} == {Rename}
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    written = export_config(FAMILY, model.config)
    assert written.pop("head_dim") == 24  # the golden leaves it to be derived
    assert {name for name in written if written[name] != config[name]} == {"architectures"}


# --- other shapes ---------------------------------------------------------------------------------

OURO = [
    *("vocab_size=40", "d_model=24", "num_core_layers=2", "feed_forward.d_ff=20"),
    *("attention.num_heads=3", "attention.num_kv_heads=3", "attention.head_dim=8"),
    *("max_seq_len=32", "num_loops=3"),
]
SHAPES = {
    "small": [],
    "five layers, one head, one loop": [
        *("num_core_layers=5", "num_loops=1"),
        *("attention.num_heads=1", "attention.num_kv_heads=1", "attention.head_dim=24"),
    ],
    "fewer keys and values, narrow heads": [
        *("attention.num_heads=4", "attention.num_kv_heads=2", "attention.head_dim=4"),
        "block.norm_eps=1e-5",
    ],
    "scaled positions": [
        *("rope.theta=100.0", "rope.scaling.factor=4.0", "rope.scaling.original_max_seq_len=16"),
    ],
}


def ouro(*changes: str) -> ModelConfig:
    return apply_overrides(preset("ouro-1.4b"), [*OURO, *changes])


@pytest.mark.parametrize("changes", SHAPES.values(), ids=list(SHAPES))
def test_other_shapes_go_there_and_back(tmp_path: Path, changes: list[str]) -> None:
    check_round_trip(FAMILY, ouro(*changes), tmp_path / "there")


@pytest.mark.parametrize("num_loops", [1, 8])
def test_generation_with_a_cache_is_that_without(num_loops: int) -> None:
    check_generation(ouro(), num_loops)


# --- the published configuration ------------------------------------------------------------------

HUB = {  # ouro.md, sections 1 and 1.3
    "model_type": "ouro",
    "architectures": ["OuroForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"},
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "layer_types": ["full_attention"] * 24,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 24,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def test_the_presets_are_the_hubs_configs() -> None:
    assert read_config(HUB) == preset("ouro-1.4b")
    twice = HUB | {"num_hidden_layers": 48, "layer_types": ["full_attention"] * 48}
    assert read_config(twice) == preset("ouro-2.6b")
    written = export_config(FAMILY, preset("ouro-1.4b"))
    assert {name for name in written if written[name] != HUB[name]} == set()


def test_a_config_that_transformers_5_wrote_again() -> None:
    old = {"rope_theta", "rope_scaling", "torch_dtype"}
    data = {name: value for name, value in HUB.items() if name not in old}
    data |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16"}
    assert read_config(data) == preset("ouro-1.4b")


# --- refusals -------------------------------------------------------------------------------------


def test_wrong_weights_are_listed_by_their_names(tmp_path: Path) -> None:
    folder = exported(FAMILY, random_model(ouro()), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.early_exit_gate.bias"], tensors["model.layers.1.input_layernorm_2.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    tensors["model.norm.weight"] = torch.zeros(23)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as error:
        load_pretrained(folder)
    text = str(error.value)
    gone = "model.early_exit_gate.bias, model.layers.1.input_layernorm_2.weight"
    assert f"missing: {gone}; " in text
    assert "unexpected: model.layers.0.self_attn.q_proj.bias; " in text
    assert "model.norm.weight is [23], expected [24]" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False"),
        ({"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types is ['sliding_attention'"),
        ({"layer_types": ["full_attention"] * 3}, "for each of 24 layers"),
        ({"head_dim": None, "num_attention_heads": 15}, "num_attention_heads is 15; it must"),
        ({"total_ut_steps": "4"}, "total_ut_steps is '4', expected a whole number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"num_experts": 8}, "unknown num_experts"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json") as error:
        read_config(HUB | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("final_norm=true", "final_norm is True, there False"),
        ("rope.interleaved=true", "rope.interleaved is True, there False"),
        ("halting=pondernet", "halting.kind is 'pondernet', there 'exit_gate'"),
        ("num_prelude_layers=1", "num_prelude_layers is 1, there 0"),
        ("rope=null", "this model lacks one of them"),
    ],
)
def test_models_that_ouro_cannot_express(change: str, message: str) -> None:
    with pytest.raises(ValueError, match="Ouro") as error:
        export_config(FAMILY, ouro(change))
    assert message in str(error.value)


def test_shapes_in_this_file_are_what_they_say() -> None:
    assert ouro(*SHAPES["scaled positions"]).rope != RopeConfig(theta=100.0)
