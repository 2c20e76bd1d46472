import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openmythos.config import (
    CopyInitConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    ModelConfig,
    MoEConfig,
    NoInjectionConfig,
    NormalInitConfig,
    ZerosInitConfig,
)
from openmythos.config.schema import apply_overrides
from openmythos.interop.families.ifm_looped_lm import FAMILY, read_config, rules
from openmythos.interop.loading import load_pretrained, usable_tokenizer
from openmythos.interop.mapping import Shift, export_config, export_tensors
from openmythos.interop.writing import save_as
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import byte_tokenizer
from tests.interop.families.examples import cached_logits, check_generation, write_folder
from tests.strategies import random_model, random_tokens

GoldenDir = Callable[[str], Path]
Json = dict[str, Any]
GOLDENS = ("ifm-parcae", "ifm-middle", "ifm-moe", "ifm-linear", "ifm-orthoinj")


def fields(golden_dir: GoldenDir, name: str, **changes: Any) -> Json:
    data = json.loads((golden_dir(name) / "config.json").read_text(encoding="utf-8"))
    return {"model": {**data["model"], **changes}, "tokenizer": data["tokenizer"]}


# --- the goldens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
@torch.no_grad()
def test_logits_are_theirs(golden_dir: GoldenDir, name: str) -> None:
    model, expected = (
        load_pretrained(golden_dir(name)),
        load_file(golden_dir(name) / "io.safetensors"),
    )
    tokens = expected["input_ids"]
    for num_loops in (1, 4, 8):
        logits = expected[f"logits_T{num_loops}"]
        assert logits.abs().max() > 5
        assert (model(tokens, num_loops=num_loops).logits - logits).abs().max() < 1e-4
    found = cached_logits(model, tokens, 4, [9, 4] + [1] * 8)
    assert (found - expected["logits_T4"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", GOLDENS)
def test_every_tensor_is_used_and_comes_back(golden_dir: GoldenDir, name: str) -> None:
    """The same bytes, except for norms, which are moved by 1 and back."""
    stored, model = (
        load_file(golden_dir(name) / "model.safetensors"),
        load_pretrained(golden_dir(name)),
    )
    moved = {rule.their_name for rule in rules(model.config) if isinstance(rule, Shift)}
    assert moved == {name for name in stored if "norm" in name}
    written = export_tensors(FAMILY, model)
    assert written.keys() == stored.keys()
    for key, tensor in written.items():
        if key in moved:
            assert (tensor - stored[key]).abs().max() < 1e-6
        else:
            assert torch.equal(tensor, stored[key])


def test_goldens_are_the_topologies_that_they_are_named_for(golden_dir: GoldenDir) -> None:
    parcae, middle, experts, linear, ortho = (
        load_pretrained(golden_dir(name)).config for name in GOLDENS
    )
    assert parcae.injection == LTIInjectionConfig() and parcae.prelude_norm
    assert (parcae.num_prelude_layers, parcae.num_core_layers, parcae.num_coda_layers) == (1, 2, 1)
    assert middle.injection == NoInjectionConfig() and middle.state_init == CopyInitConfig()
    assert isinstance(experts.core_ff, MoEConfig) and experts.num_core_layers == 3
    assert linear.injection == LinearInjectionConfig(bias=True) and linear.loop_norm
    assert ortho.injection == LTIInjectionConfig(orthogonal=True) and not ortho.prelude_norm


def test_bf16_adds_the_one_as_their_inference_does(golden_dir: GoldenDir, tmp_path: Path) -> None:
    golden = golden_dir("ifm-parcae")
    stored = {k: v.bfloat16() for k, v in load_file(golden / "model.safetensors").items()}
    folder = write_folder(tmp_path / "model", fields(golden_dir, "ifm-parcae"), stored)
    model = load_pretrained(folder)
    norm = stored["layers.1.attention.norm.weight"]
    assert torch.equal(model.core[0].attention_norm.weight, norm + 1.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# --- there and back -------------------------------------------------------------------------------

SHAPES = {
    "as in part II": [],
    "their noise": ["state_init.kind=normal", f"state_init.std={48**-0.5!r}", "prelude_norm=false"],
    "a zero state, no norm": ["prelude_norm=false", "num_loops=8", "num_prelude_layers=2"],
    "a plain transformer": [
        *("num_prelude_layers=0", "num_coda_layers=0", "num_loops=1", "prelude_norm=false"),
        *("injection=none", "state_init=copy", "rope.theta=100.5"),
    ],
    "a loop in the middle": ["injection=none", "state_init=copy", "prelude_norm=false"],
    "Huginn-Linear without its bias": ["injection=linear", "prelude_norm=false"],
    "OrthoInj with a norm": ["injection.orthogonal=true"],
    "scaled embeddings": [f"embed_scale={48**0.5!r}", "block.norm_eps=1e-5"],
}


def looped(golden_dir: GoldenDir, *changes: str) -> ModelConfig:
    return apply_overrides(read_config(fields(golden_dir, "ifm-parcae")), list(changes))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=list(SHAPES))
@torch.no_grad()
def test_shapes_go_there_and_back(
    golden_dir: GoldenDir, tmp_path: Path, changes: list[str]
) -> None:
    model = random_model(looped(golden_dir, *changes))
    save_as(FAMILY, model, tmp_path / "there")
    again = load_pretrained(tmp_path / "there")
    assert again.config == model.config
    tokens = random_tokens(model.config, 2, 7)
    for num_loops in (1, 3):
        found, wanted = (m(tokens, num_loops=num_loops).logits for m in (again, model))
        assert wanted.std() > 0.1 and (found - wanted).abs().max() < 1e-5


def test_a_norm_without_weights_comes_back_unless_it_was_trained(
    golden_dir: GoldenDir, tmp_path: Path
) -> None:
    model = load_pretrained(golden_dir("ifm-linear"))
    assert torch.equal(model.loop_norm.weight, torch.ones(48))
    save_as(FAMILY, model, tmp_path / "there")
    assert load_pretrained(tmp_path / "there").config == model.config
    with torch.no_grad():
        model.loop_norm.weight[3] = 1.5
    with pytest.raises(ValueError, match=r"loop_norm\.weight is not 1 everywhere any more"):
        save_as(FAMILY, model, tmp_path / "trained")


def test_their_depth_control_is_dense(golden_dir: GoldenDir) -> None:
    whole = {"huginn_prelude_layers": 0, "huginn_coda_layers": 0, "arch": "huginn"}
    data = fields(golden_dir, "ifm-moe", **whole, huginn_prelude_norm="rms")
    with pytest.raises(ValueError, match="need dense layers"):
        read_config(data)
    data["model"]["huginn_prelude_norm"] = "none"
    assert read_config(data).injection == LTIInjectionConfig()


def test_experts_come_back_unless_their_bias_was_trained(
    golden_dir: GoldenDir, tmp_path: Path
) -> None:
    model = load_pretrained(golden_dir("ifm-moe"))
    assert not model.core[0].feed_forward.bias.any()
    save_as(FAMILY, model, tmp_path / "there")
    assert load_pretrained(tmp_path / "there").config == model.config
    model.core[1].feed_forward.bias[0, 2] = 0.01
    with pytest.raises(ValueError, match=r"core\.1\.feed_forward\.bias is not 0 everywhere"):
        save_as(FAMILY, model, tmp_path / "trained")
    assert not (tmp_path / "trained").exists()


def test_generation_with_a_cache_is_that_without(golden_dir: GoldenDir) -> None:
    noise = NormalInitConfig(std=48**-0.5)
    check_generation(replace(looped(golden_dir), state_init=noise), 3)


def test_the_tokenizer_stands_in_a_folder_of_its_own(golden_dir: GoldenDir, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    golden = golden_dir("ifm-middle")
    write_folder(folder, fields(golden_dir, "ifm-middle"), load_file(golden / "model.safetensors"))
    assert usable_tokenizer(folder)[0] is None
    (folder / "tokenizer").mkdir()
    byte_tokenizer().save(folder / "tokenizer")
    found, _ = usable_tokenizer(folder)
    assert found is not None and found.fingerprint == byte_tokenizer().fingerprint


# --- the published recipes ------------------------------------------------------------------------

P1 = {  # xllm/paper_part1/recipes.py, _model_fields, where it differs from the small goldens
    "num_layers": 28,
    "model_dim": 1536,
    "num_heads": 24,
    "num_kv_heads": 6,
    "head_dim": 64,
    "rope_head_dim": 64,
    "ffn_hidden_dim": 4352,
    "vocab_size": 250624,
}
P1_HUGINN = {
    "arch": "huginn",
    "loop_times": 8,
    "huginn_prelude_layers": 8,
    "huginn_recurrent_layers": 12,
    "huginn_coda_layers": 8,
    "huginn_state_init": "normal",
    "huginn_input_injection": "diagonal",
}
MOE = {"num_experts": 25, "num_activated_experts": 2, "expert_inter_dim": 2432}


def part_one(golden_dir: GoldenDir, **changes: Any) -> Json:
    dense = {"num_experts": 0, "num_activated_experts": 0}
    return fields(golden_dir, "ifm-moe", **dense | P1 | changes)


def test_the_recipes_of_part_one(golden_dir: GoldenDir) -> None:
    def read(**changes: Any) -> ModelConfig:
        return read_config(part_one(golden_dir, **changes))

    plain, deep = read(loop_times=1), read(loop_times=1, num_layers=112)
    assert (plain.num_core_layers, plain.num_loops) == (28, 1)
    assert (deep.num_core_layers, deep.effective_depth()) == (112, 112)
    ouro = read(loop_times=4)  # dense_ouro
    assert ouro == replace(plain, num_loops=4)
    huginn = read(**P1_HUGINN)  # dense_huginn
    assert (huginn.num_prelude_layers, huginn.num_core_layers, huginn.num_coda_layers) == (8, 12, 8)
    assert huginn.state_init == NormalInitConfig(std=1536**-0.5)
    assert huginn.injection == LTIInjectionConfig() and not huginn.prelude_norm
    assert (huginn.effective_depth(), huginn.max_seq_len) == (112, 16384)
    middle = read(**P1_HUGINN | {"huginn_state_init": "input", "huginn_input_injection": "none"})
    assert (middle.injection, middle.state_init) == (NoInjectionConfig(), CopyInitConfig())
    experts = read(**MOE, loop_times=4)  # moe_ouro
    assert experts.core_feed_forward == MoEConfig(
        num_experts=25, num_experts_per_token=2, d_expert=2432, num_shared_experts=0
    )


def test_the_counts_are_those_of_their_formulas(golden_dir: GoldenDir) -> None:
    """The parameters of Transformer.num_parameters and of the injection."""
    config = read_config(part_one(golden_dir, **P1_HUGINN))
    with torch.device("meta"):
        model = RecurrentDepthLM(config)
    d, k, f = 1536, 64, 4352
    block = d * (24 + 6) * k * 2 + 2 * d + 3 * d * f
    total = 28 * block + 2 * d * 250624 + d + d * d + 2 * d
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"huginn_hierarchical_state": "shared_hl"}, "huginn_hierarchical_state is 'shared_hl'"),
        ({"huginn_state_init": "input"}, "their state starts as the prelude's output itself"),
        ({**MOE}, "in prelude and coda as well"),
        ({"huginn_input_injection": "gate"}, "supported: 'none', 'diagonal', 'linear'"),
        ({"huginn_recurrent_exit_norm": "rms"}, "supported: 'none', 'parameterless_rms'"),
        ({"huginn_ortho_projection_eps": 1e-3}, "huginn_ortho_projection_eps is 0.001; only"),
        ({"huginn_recurrent_layers": 11}, "huginn_recurrent_layers is 11; only 12"),
        ({"huginn_prelude_layers": 20}, "layers 20 to 20 of 28 cannot be the loop"),
        ({"arch": "gekko"}, "arch is 'gekko'; allowed: 'transformer', 'huginn'"),
        ({"arch": "transformer", "loop_input_injection": "diagonal"}, "loop_input_injection is"),
        ({"arch": "transformer", **MOE, "num_activated_experts": 1}, "num_activated_experts is 1"),
        ({"dense_prelude_input_injection": "diagonal"}, "dense_prelude_input_injection is"),
        ({"qknorm": True}, "qknorm is True; only False"),
        ({"apply_rmsnorm": None}, "apply_rmsnorm is None; only True"),
        ({"rope_head_dim": 32}, "rope_head_dim is 32; only 64"),
        ({"num_layers": "28"}, "num_layers is '28', expected a whole number"),
        ({"mamba": 1}, "unknown mamba"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    golden_dir: GoldenDir, change: Json, message: str
) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        read_config(part_one(golden_dir, **P1_HUGINN | change))
    assert message in str(error.value)


def test_fields_that_a_recipe_leaves_out_have_their_defaults(golden_dir: GoldenDir) -> None:
    """Part II's dense baseline names neither the loop nor the core (recipes.py, d4)."""
    data = fields(golden_dir, "ifm-parcae")
    kept = {k: v for k, v in data["model"].items() if not k.startswith(("huginn_", "loop_"))}
    kept |= {"arch": "transformer", "num_kv_heads": None, "head_dim": None}
    config = read_config({"model": kept})
    assert (config.num_core_layers, config.num_loops, config.num_prelude_layers) == (4, 1, 0)
    assert (config.attention.num_kv_heads, config.attention.head_dim) == (6, 8)
    del kept["swiglu"]
    with pytest.raises(ValueError, match="swiglu is False; only True"):
        read_config({"model": kept})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("injection=add", "injection.kind is 'add', there 'lti'"),
        ("readout=linear", "readout is 'linear', there 'none'"),
        ("rope.interleaved=false", "rope.interleaved is False, there True"),
        ("tie_embeddings=true", "tie_embeddings is True, there False"),
        ("state_init.kind=normal", "state_init.std is 1.0"),
        ("rope=null", "this model lacks one of them"),
        ("max_seq_len=100", "max_seq_len is 100, there 96"),
    ],
)
def test_models_that_looped_lm_cannot_express(
    golden_dir: GoldenDir, change: str, message: str
) -> None:
    with pytest.raises(ValueError, match="LoopedLM") as error:
        export_config(FAMILY, looped(golden_dir, change))
    assert message in str(error.value)


def test_the_example_has_a_zero_state(golden_dir: GoldenDir) -> None:
    assert looped(golden_dir).state_init == ZerosInitConfig()
