import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from openmythos.checkpoint.save import save_pretrained
from openmythos.config import (
    GQAConfig,
    Llama3ScalingConfig,
    ModelConfig,
    NormalInitConfig,
    RopeConfig,
    SwiGLUConfig,
    ZerosInitConfig,
    counts,
)
from openmythos.config.presets import preset
from openmythos.config.schema import apply_overrides
from openmythos.interop.families.huginn import (
    FAMILY,
    RETROFITTED,
    read_config,
    read_retrofitted,
    rules,
)
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import Family, Recomputed, TiedCopy, export_config
from openmythos.model.recurrent import RecurrentDepthLM
from tests.interop.families.examples import (
    cached_logits,
    check_generation,
    check_round_trip,
    check_same_bytes,
    exported,
    write_folder,
)
from tests.strategies import random_model

GoldenDir = Callable[[str], Path]

# --- the golden -----------------------------------------------------------------------------------


@pytest.fixture
def golden(golden_dir: GoldenDir) -> Path:
    return golden_dir("huginn")


@pytest.fixture
def zero_state(golden: Path, tmp_path: Path) -> RecurrentDepthLM:
    """The golden with the zero state that it was run with: noise of std 0, as its code says it."""
    folder = tmp_path / "zero"
    shutil.copytree(golden, folder)
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    config["init_values"]["std"] = 0.0
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_pretrained(folder)


@pytest.mark.parametrize("num_loops", [1, 4, 8, 16])
@torch.no_grad()
def test_logits_and_states_are_huginns(
    golden: Path, zero_state: RecurrentDepthLM, num_loops: int
) -> None:
    """Logits reach 22 in size; the stored states are already through ``ln_f``."""
    expected = load_file(golden / "io.safetensors")
    tokens, logits = expected["input_ids"], expected[f"logits_T{num_loops}"]
    out = zero_state(tokens, num_loops=num_loops)
    assert (out.logits - logits).abs().max() < 1e-4
    state = zero_state.final_norm(out.h)
    assert (state - expected[f"state_T{num_loops}"]).abs().max() < 1e-5
    found = cached_logits(zero_state, tokens, num_loops, [9, 4] + [1] * 8)
    assert (found - logits).abs().max() < 1e-4


@torch.no_grad()
def test_a_given_zero_state_needs_no_other_config(golden: Path) -> None:
    model, expected = load_pretrained(golden), load_file(golden / "io.safetensors")
    tokens = expected["input_ids"]
    ctx = model.context(tokens)
    e = model.encode(tokens, ctx)
    h, loops = torch.zeros_like(e), torch.zeros(len(tokens), dtype=torch.int64)
    for loop in range(4):
        h = model.step(h, e, loops + loop, ctx)
    assert (model.decode(h, ctx) - expected["logits_T4"]).abs().max() < 1e-4


def test_export_gives_the_same_bytes(golden: Path) -> None:
    check_same_bytes(FAMILY, golden)
    model = load_pretrained(golden)
    skipped = [r.their_name for r in rules(model.config) if isinstance(r, Recomputed | TiedCopy)]
    assert skipped == ["freqs_cis", "lm_head.weight"]
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    written = export_config(FAMILY, model.config)
    # What only training and new weights read is written as the published model has it.
    lost = {"architectures", "mean_backprop_depth", "padding_multiple"}
    assert {k for k in written if k != "init_values" and written[k] != config[k]} == lost
    for name, value in config["init_values"].items():
        assert written["init_values"][name] == pytest.approx(value, rel=1e-15), name
    assert read_config(written) == model.config


def test_like_init_is_a_cut_normal(golden: Path) -> None:
    """sqrt(d) TruncNormal(0, sqrt(2 / (5 d)), 3 sigma): the effective std is sqrt(2 / 5)."""
    model = load_pretrained(golden)
    assert model.config.state_init == NormalInitConfig(std=float(f"{math.sqrt(0.4):.15g}"))
    ctx = model.context(torch.zeros(400, 10, dtype=torch.int64), seeds=range(400))
    h = model.init_state(torch.zeros(400, 10, 96), ctx)
    assert h.abs().max() <= 3 * math.sqrt(0.4)
    cut = 2 * 3 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2))
    assert float(h.std()) == pytest.approx(math.sqrt(0.4 * (1 - cut)), rel=0.01)


def test_our_copy_of_it_is_the_same_model(golden: Path, tmp_path: Path) -> None:
    model = load_pretrained(golden)
    again = load_pretrained(save_pretrained(model, tmp_path / "ours"))
    assert again.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


# --- other shapes ---------------------------------------------------------------------------------

HUGINN = [
    "vocab_size=40",
    "d_model=24",
    "attention.num_heads=3",
    "attention.num_kv_heads=3",
    "attention.head_dim=8",
    "feed_forward.d_ff=20",
    "max_seq_len=32",
    "num_core_layers=2",
    "num_prelude_layers=1",
    "num_coda_layers=1",
    "num_loops=3",
]
HUGINN_SHAPES = {
    "small": [],
    "no prelude, three coda layers, one head": [
        *("num_prelude_layers=0", "num_coda_layers=3"),
        *("attention.num_heads=1", "attention.num_kv_heads=1", "attention.head_dim=24"),
    ],
    "untied, no bias, other theta and eps": [
        *("tie_embeddings=false", "attention.qk_bias=false", "rope.theta=1000.0"),
        "block.norm_eps=1e-5",
    ],
    "zero state, one layer": ["state_init=zeros", "num_core_layers=1", "num_coda_layers=0"],
    "another scale": ["embed_scale=1.7", "state_init.std=0.25"],
}
RETROFIT = [
    *HUGINN,
    *("attention.num_heads=6", "attention.num_kv_heads=2", "attention.head_dim=4"),
    *("attention.qk_bias=false", "tie_embeddings=false", "embed_scale=1.0", "readout=none"),
    *("block.norm=pre", "block.norm_eps=1e-5", "rope.interleaved=false", "rope.theta=500000.0"),
    *("state_init.std=0.00870388279778489", "rope.scaling.factor=32.0"),
    "rope.scaling.original_max_seq_len=16",
]
RETROFIT_SHAPES = {
    "small": [],
    "four layers around six, all heads": [
        *("num_prelude_layers=4", "num_core_layers=6", "num_coda_layers=4"),
        "attention.num_kv_heads=6",
    ],
    "no scaling, one kv head": ["rope.scaling=null", "attention.num_kv_heads=1"],
    "tied, zero state, another scale": [
        *("tie_embeddings=true", "state_init=zeros", "embed_scale=2.0"),
        *("rope.scaling.low_freq_factor=0.5", "rope.scaling.high_freq_factor=2.0"),
    ],
}


def huginn(*changes: str) -> ModelConfig:
    return apply_overrides(preset("huginn-3.5b"), [*HUGINN, *changes])


def retrofit(*changes: str) -> ModelConfig:
    return apply_overrides(preset("huginn-3.5b"), [*RETROFIT, *changes])


@pytest.mark.parametrize("changes", HUGINN_SHAPES.values(), ids=list(HUGINN_SHAPES))
def test_other_shapes_go_there_and_back(tmp_path: Path, changes: list[str]) -> None:
    check_round_trip(FAMILY, huginn(*changes), tmp_path / "there")


@pytest.mark.parametrize("changes", RETROFIT_SHAPES.values(), ids=list(RETROFIT_SHAPES))
def test_retrofitted_shapes_go_there_and_back(tmp_path: Path, changes: list[str]) -> None:
    check_round_trip(RETROFITTED, retrofit(*changes), tmp_path / "there")


@pytest.mark.parametrize("num_loops", [1, 8])
@pytest.mark.parametrize("make", [huginn, retrofit])
def test_generation_with_a_cache_is_that_without(make: Any, num_loops: int) -> None:
    check_generation(make(), num_loops)


def test_names_and_shapes_are_those_of_the_hub(tmp_path: Path) -> None:
    """huginn.md, section 1.3: 77 tensors at 2 + 4 + 2 layers, all of them named by a rule."""
    model = RecurrentDepthLM(
        huginn("num_prelude_layers=2", "num_coda_layers=2", "num_core_layers=4")
    )
    tensors = load_file(exported(FAMILY, model, tmp_path / "there") / "model.safetensors")
    names = {name for r in rules(model.config) for name in getattr(r, "theirs", (None,))}
    assert len(tensors | {"freqs_cis": None}) == 77
    assert tensors.keys() == (names - {None}) | {"lm_head.weight"}
    block = "transformer.core_block.3"
    assert tensors[f"{block}.attn.qk_bias"].shape == (2, 1, 3, 8)
    assert tensors[f"{block}.attn.Wqkv.weight"].shape == (72, 24)
    assert tensors["transformer.adapter.weight"].shape == (24, 48)


# --- the published configurations -----------------------------------------------------------------

HUB = {  # huginn.md, section 1.7
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "architecture_class_name": "RecurrentGPT",
    "auto_map": {"AutoConfig": "raven_config_minimal.RavenConfig"},
    "n_embd": 5280,
    "n_heads": 55,
    "num_attention_heads": 55,
    "num_key_value_heads": 55,
    "head_dim": 96,
    "intermediate_size": 17920,
    "n_layers": 8,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "block_size": 4096,
    "vocab_size": 65536,
    "padded_vocab_size": 65536,
    "padding_multiple": 4096,
    "effective_expected_depth": 132,
    "norm_eps": 1e-06,
    "rope_base": 50000,
    "qk_bias": True,
    "bias": False,
    "tie_embeddings": True,
    "tie_word_embeddings": True,
    "injection_type": "linear",
    "block_class_name": "SandwichBlock",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "init_values": {
        "std": 0.008703882797784892,
        "out_proj": 0.0005356869554443541,
        "embedding": 0.008703882797784892,
        "embed_scale": 72.6636084983398,
    },
    "state_init": "like-init",
    "mean_recurrence": 32,
    "mean_backprop_depth": 8,
    "sampling_scheme": "poisson-lognormal-filling",
    "activation_checkpoint_impl": "per-iteration",
    "torch_dtype": "float32",
    "transformers_version": "4.47.1",
    "bos_token_id": 65504,
    "eos_token_id": 65505,
    "pad_token_id": 65509,
}
# As convert_llama.py makes it from Llama-3.2-1B: the hub's fields and these.
HUB_RETROFIT = HUB | {
    "n_embd": 2048,
    "n_heads": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "n_layers": 16,
    "n_layers_in_prelude": 4,
    "n_layers_in_recurrent_block": 8,
    "n_layers_in_coda": 4,
    "norm_eps": 1e-05,
    "vocab_size": 128256,
    "padded_vocab_size": 128256,
    "rope_base": 500000.0,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_embeddings": False,
    "qk_bias": False,
    "max_position_embeddings": 131072,
    "init_values": HUB["init_values"] | {"embed_scale": 1.0},
}


def test_the_preset_is_the_hubs_config() -> None:
    assert read_config(HUB) == preset("huginn-3.5b")
    written = export_config(FAMILY, preset("huginn-3.5b"))
    assert written["init_values"] == pytest.approx(HUB["init_values"], rel=1e-12)
    same = written.keys() & HUB.keys() - {"init_values"}
    assert {name: written[name] for name in same} == {name: HUB[name] for name in same}


def test_the_retrofitted_config_is_read() -> None:
    config = read_retrofitted(HUB_RETROFIT)
    assert config.attention == GQAConfig(num_heads=32, num_kv_heads=8, head_dim=64)
    assert config.rope == RopeConfig(theta=500000.0, scaling=Llama3ScalingConfig(factor=32.0))
    assert (config.max_seq_len, config.readout, config.block.norm) == (131072, "none", "pre")
    assert config.state_init == NormalInitConfig(std=0.00870388279778489)
    layer = 2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 8192 + 2 * 2048
    others = 2 * 128256 * 2048 + 2 * 2048 * 2048 + 2048
    assert counts.total_params(config) == 16 * layer + others
    assert read_retrofitted(export_config(RETROFITTED, config)) == config


# --- a retrofitted model against transformers' own Llama ------------------------------------------

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLACES = [*(("prelude", i) for i in range(2)), *(("core_block", i) for i in range(3)), ("coda", 0)]


@torch.no_grad()
def random_llama() -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(**LLAMA, rope_parameters=SCALED, tie_word_embeddings=False)
    )
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.3 * noise if "norm" in name else noise / tensor.shape[-1] ** 0.5)
    return model.eval()


def retrofitted(llama: LlamaForCausalLM, adapter: Tensor, folder: Path) -> RecurrentDepthLM:
    """Its layers under the names of the published conversion, in a folder, loaded."""
    theirs = llama.state_dict()
    tensors = {
        "transformer.wte.weight": theirs["model.embed_tokens.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
        "transformer.ln_f.weight": theirs["model.norm.weight"],
        "transformer.adapter.weight": adapter,
    }
    for layer, (stage, place) in enumerate(PLACES):
        old, new = f"model.layers.{layer}", f"transformer.{stage}.{place}"
        qkv = [theirs[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv"]
        gate_up = [theirs[f"{old}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        tensors |= {
            f"{new}.attn.Wqkv.weight": torch.cat(qkv),
            f"{new}.attn.proj.weight": theirs[f"{old}.self_attn.o_proj.weight"],
            f"{new}.mlp.fc.weight": torch.cat(gate_up),
            f"{new}.mlp.proj.weight": theirs[f"{old}.mlp.down_proj.weight"],
            f"{new}.norm_1.weight": theirs[f"{old}.input_layernorm.weight"],
            f"{new}.norm_2.weight": theirs[f"{old}.post_attention_layernorm.weight"],
        }
    config = HUB_RETROFIT | {
        "n_embd": 24,
        "n_heads": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 32,
        "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": 3,
        "n_layers_in_coda": 1,
        "vocab_size": 40,
        "padded_vocab_size": 40,
        "rope_theta": 100.0,
        "rope_scaling": {name: value for name, value in SCALED.items() if name != "rope_theta"},
        "init_values": {"std": 0.0, "embed_scale": 1.0},
    }
    return load_pretrained(write_folder(folder, config, tensors))


@torch.no_grad()
def test_layers_run_once_are_llama(tmp_path: Path) -> None:
    """With the adapter [0 | I] every loop starts from the prelude's output."""
    llama, tokens = random_llama(), torch.arange(40).view(2, 20)
    model = retrofitted(llama, torch.cat((torch.zeros(24, 24), torch.eye(24)), dim=1), tmp_path)
    expected = llama(tokens).logits
    assert expected.std() > 0.5
    for num_loops in (1, 8):
        assert (model(tokens, num_loops=num_loops).logits - expected).abs().max() < 1e-5


@torch.no_grad()
def test_loops_are_llamas_layers_around_the_adapter(tmp_path: Path) -> None:
    llama, tokens = random_llama(), torch.arange(40).view(2, 20)
    adapter = torch.randn(24, 48, generator=torch.Generator().manual_seed(3)) / 7
    model, body = retrofitted(llama, adapter, tmp_path), llama.model
    x = body.embed_tokens(tokens)
    positions = body.rotary_emb(x, torch.arange(20)[None])

    def run(x: Tensor, layers: slice) -> Tensor:
        for layer in body.layers[layers]:
            x = layer(x, position_embeddings=positions)
        return x

    e, h = run(x, slice(0, 2)), torch.zeros(2, 20, 24)
    for loop in range(1, 9):
        h = run(torch.cat((h, e), dim=-1) @ adapter.T, slice(2, 5))
        if loop in (1, 4, 8):
            expected = llama.lm_head(body.norm(run(h, slice(5, 6))))
            found = model(tokens, num_loops=loop).logits
            assert (found - expected).abs().max() < 2e-5


# --- refusals -------------------------------------------------------------------------------------


def test_wrong_weights_are_listed_by_their_names(tmp_path: Path) -> None:
    folder = exported(FAMILY, random_model(huginn()), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.prelude.0.norm_2.weight"], tensors["lm_head.weight"]
    tensors["transformer.coda.0.attn.q_norm.weight"] = torch.zeros(1)
    tensors["transformer.ln_f.weight"] = torch.zeros(23)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as error:
        load_pretrained(folder)
    text = str(error.value)
    assert "missing: transformer.prelude.0.norm_2.weight; " in text  # the tied copy may be absent
    assert "unexpected: transformer.coda.0.attn.q_norm.weight; " in text
    assert "transformer.ln_f.weight is [23], expected [24]" in text


def test_retrofitted_olmo_is_refused(tmp_path: Path) -> None:
    """Two norms as well, but after the branches: its norms of queries and keys give it away."""
    folder = exported(RETROFITTED, random_model(retrofit()), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.prelude.0.attn.q_norm.weight"] = torch.ones(24)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: transformer\.prelude\.0\.attn\.q_norm"):
        load_pretrained(folder)


def test_a_head_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    folder = exported(FAMILY, random_model(huginn()), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("read", "change", "message"),
    [
        (read_config, {"n_embd": 5281}, "n_heads is 55; it must divide n_embd=5281"),
        (read_config, {"num_key_value_heads": 11}, "num_key_value_heads is 11; only 55"),
        (read_config, {"padded_vocab_size": 70000}, "padded_vocab_size is 70000; only 65536"),
        (read_config, {"head_dim": 90}, "head_dim is 90; only 96"),
        (read_config, {"state_init": "zero"}, "state_init is 'zero'; only 'like-init'"),
        (read_config, {"injection_type": "add"}, "injection_type is 'add'; only 'linear'"),
        (read_config, {"test_time_noise": 0.1}, "test_time_noise is 0.1; only 0"),
        (read_config, {"init_values": {"std": 0.1}}, "missing embed_scale"),
        (read_config, {"rope_scaling": None}, "unknown rope_scaling"),
        (read_config, {"quantization_config": {}}, "unknown quantization_config"),
        (read_config, {"block_size": "4096"}, "block_size is '4096', expected a whole number"),
        (read_retrofitted, {"qk_bias": True}, "qk_bias is True; it needs num_key_value_heads"),
        (read_retrofitted, {"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        (read_retrofitted, {"n_experts": 4}, "unknown n_experts"),
    ],
)
def test_bad_configs_are_refused(read: Any, change: dict[str, Any], message: str) -> None:
    data = (HUB if read is read_config else HUB_RETROFIT) | change
    with pytest.raises(ValueError, match=r"config\.json") as error:
        read(data)
    assert message in str(error.value)


def test_missing_fields_are_listed() -> None:
    needed = {"n_embd", "mean_recurrence", "block_size", "rope_base"}
    with pytest.raises(ValueError, match="missing") as error:
        read_config({name: value for name, value in HUB.items() if name not in needed})
    assert all(f"missing {name}" in str(error.value) for name in needed)
    with pytest.raises(ValueError, match=r"missing rope_theta \(of the rotary positions\)"):
        read_retrofitted({k: v for k, v in HUB_RETROFIT.items() if k != "rope_theta"})


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (FAMILY, huginn("injection=add"), "injection.kind is 'add', there 'linear'"),
        (FAMILY, huginn("attention.head_dim=4"), "attention.head_dim is 4, there 8"),
        (FAMILY, huginn("state_init=copy"), "this model lacks one of them"),
        (FAMILY, retrofit(), "num_key_value_heads is 2; only 6 is supported"),
        (FAMILY, huginn("readout=none"), "readout is 'none', there 'final_norm'"),
        (RETROFITTED, huginn(), "rope.interleaved is True, there False"),
        (RETROFITTED, retrofit("halting=act"), "halting.kind is 'act', there None"),
    ],
)
def test_models_that_huginn_cannot_express(
    family: Family, config: ModelConfig, message: str
) -> None:
    with pytest.raises(ValueError, match="Huginn") as error:
        export_config(family, config)
    assert message in str(error.value)


def test_shapes_in_this_file_are_what_they_say() -> None:
    assert isinstance(huginn("state_init=zeros").state_init, ZerosInitConfig)
    assert huginn().feed_forward == SwiGLUConfig(d_ff=20)
    assert retrofit().rope == RopeConfig(
        theta=500000.0, scaling=Llama3ScalingConfig(factor=32.0, original_max_seq_len=16)
    )
