import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from openmythos.config import Llama3ScalingConfig, ModelConfig, RopeConfig, counts
from openmythos.config.schema import apply_overrides
from openmythos.engine.reference import generate
from openmythos.interop.families.llama import LLAMA, NANBEIGE, read_config, read_nanbeige_config
from openmythos.interop.loading import load_config, load_pretrained
from openmythos.interop.mapping import export_config, export_tensors
from tests.interop.families.examples import PROMPTS, check_generation, check_round_trip, exported

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits of about 1: a wrong weight shows
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES = {
    "grouped heads, tied": {"tie_word_embeddings": True},
    "as many kv heads, wider than the stream": {
        "hidden_size": 24,
        "num_key_value_heads": 4,
        "head_dim": 10,
    },
    "one layer, one kv head, other theta and eps": {
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "llama3 positions": {"rope_parameters": LLAMA3},
}
TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 35, 8, 9], [7, 9, 32, 3, 8, 4, 6, 2, 6, 4]])


def random_llama(**changes: Any) -> transformers.LlamaForCausalLM:
    """Made by transformers; norms differ from 1, so that their places matter."""
    config = transformers.LlamaConfig(**(SHAPE | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
def llama_logits(model: transformers.LlamaForCausalLM, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


# --- Llama ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", SHAPES.values(), ids=list(SHAPES))
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path: Path, change: dict[str, Any]) -> None:
    theirs = random_llama(**change)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    wanted = llama_logits(theirs, TOKENS)
    assert wanted.std() > 0.5
    assert (ours(TOKENS).logits - wanted).abs().max() < 1e-5
    assert load_config(tmp_path / "theirs") == ours.config
    # And back: the same bytes, which transformers opens to the same logits.
    stored, written = load_file(tmp_path / "theirs/model.safetensors"), export_tensors(LLAMA, ours)
    if ours.config.tie_embeddings:  # transformers leaves the copy out
        assert torch.equal(written.pop("lm_head.weight"), stored["model.embed_tokens.weight"])
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    back = exported(LLAMA, ours, tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert torch.equal(llama_logits(again, TOKENS), wanted)


@pytest.mark.parametrize("change", SHAPES.values(), ids=list(SHAPES))
def test_shapes_go_there_and_back(tmp_path: Path, change: dict[str, Any]) -> None:
    fields = random_llama(**change).config.to_diff_dict()
    check_round_trip(LLAMA, read_config(fields), tmp_path / "model")


def test_greedy_generation_is_that_of_transformers(tmp_path: Path) -> None:
    theirs = random_llama()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    found = generate(ours, PROMPTS, max_new_tokens=8)
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert tokens == wanted[0, len(prompt) :].tolist()
    check_generation(ours.config, num_loops=1)
    check_generation(ours.config, num_loops=8)


def test_configs_of_version_4_and_bare_ones() -> None:
    """Absent fields have the defaults of LlamaConfig; null ones are absent."""
    bare = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    bare |= {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}
    config = read_config(bare)
    assert config.attention.num_kv_heads == 4 and config.attention.head_dim == 8
    assert config.rope == RopeConfig(theta=10_000.0) and config.max_seq_len == 2048
    assert config.block.norm_eps == 1e-6 and not config.tie_embeddings
    full = transformers.LlamaConfig(**bare)
    assert read_config(full.to_diff_dict()) == read_config(full.to_dict()) == config
    nulls = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "rope_theta": 5e5}
    old = read_config(bare | nulls | {"torch_dtype": "bfloat16", "pretraining_tp": 1})
    assert old.rope == RopeConfig(theta=5e5)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    scaled = read_config(bare | {"rope_theta": 5e5, "rope_scaling": scaling})
    part = Llama3ScalingConfig(factor=8.0, original_max_seq_len=16)
    assert scaled.rope == RopeConfig(theta=5e5, scaling=part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"sliding_window": 4}, "unknown sliding_window"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; it must divide hidden_size=32"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3"),
        ({"vocab_size": "40"}, "vocab_size is '40', expected a whole number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "they must be equal"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = load_pretrained(saved_llama(tmp_path / "model"))
    file = tmp_path / "model" / "config.json"
    stored = export_config(LLAMA, model.config)
    del stored["head_dim"]
    file.write_text(json.dumps(stored | change), encoding="utf-8")
    with pytest.raises(ValueError, match="read as Llama") as error:
        load_pretrained(tmp_path / "model")
    assert message in str(error.value)


def saved_llama(folder: Path, **changes: Any) -> Path:
    random_llama(**changes).save_pretrained(folder)
    return folder


def test_old_files_may_hold_rotary_tables(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path / "model")
    expected, tensors = load_pretrained(folder), load_file(folder / "model.safetensors")
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, **tables}, folder / "pytorch_model.bin")
    assert torch.equal(load_pretrained(folder)(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("num_loops=2", "num_loops is 2, there 1"),
        ("num_coda_layers=1", "num_coda_layers is 1, there 0"),
        ("loop_norm=true", "loop_norm is True"),
        ("rope=null", "lacks one of them"),
        ("feed_forward.kind=relu_squared", "lacks one of them"),
    ],
)
def test_models_that_no_llama_is(change: str, message: str) -> None:
    extra = ["feed_forward.d_ff=8"] if "relu" in change else []
    config: ModelConfig = apply_overrides(
        read_config(SHAPE | {"num_hidden_layers": 2}), [change, *extra]
    )
    with pytest.raises(ValueError, match="Llama") as error:
        export_config(LLAMA, config)
    assert message in str(error.value)


# --- Nanbeige -------------------------------------------------------------------------------------

# As published with Nanbeige4.2-3B.
NANBEIGE_3B = {
    "architectures": ["NanbeigeForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_nanbeige.NanbeigeConfig"},
    "model_type": "nanbeige",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 166100,
    "eos_token_id": 166101,
    "pad_token_id": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 10752,
    "kv_channels": 128,
    "loop_loss_weights": [],
    "max_position_embeddings": 262144,
    "num_attention_heads": 48,
    "num_hidden_layers": 22,
    "num_key_value_heads": 8,
    "num_loops": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 70000000,
    "skip_loop_final_norm": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 166144,
}
SMALL_NANBEIGE = NANBEIGE_3B | {
    **{key: SHAPE[key] for key in SHAPE if key != "initializer_range"},
    "head_dim": 8,
    "kv_channels": 8,
}
NANBEIGE_SHAPES = {
    "norm between the loops": {},
    "norm after all loops": {"skip_loop_final_norm": True},
    "three loops, tied, one kv head": {
        "num_loops": 3,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
}


def nanbeige_folder(folder: Path, theirs: transformers.LlamaForCausalLM, **fields: Any) -> Path:
    """A Llama's weights with Nanbeige's config."""
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SMALL_NANBEIGE | fields), encoding="utf-8")
    return folder


@torch.no_grad()
def looped_logits(
    model: transformers.LlamaForCausalLM, tokens: Tensor, num_loops: int, skip_norm: bool
) -> Tensor:
    """Nanbeige's forward out of transformers' parts: the stack again on its own output."""
    x, norm = model.model.embed_tokens(tokens), model.model.norm
    for loop in range(num_loops):
        model.model.norm = torch.nn.Identity() if skip_norm and loop < num_loops - 1 else norm
        x = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
    return model.lm_head(x)


@pytest.mark.parametrize("fields", NANBEIGE_SHAPES.values(), ids=list(NANBEIGE_SHAPES))
@torch.no_grad()
def test_nanbeige_is_a_llama_run_again(tmp_path: Path, fields: dict[str, Any]) -> None:
    used = SMALL_NANBEIGE | fields
    theirs = random_llama(
        tie_word_embeddings=used["tie_word_embeddings"],
        num_key_value_heads=used["num_key_value_heads"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 7e7},
    )
    ours = load_pretrained(nanbeige_folder(tmp_path / "model", theirs, **fields))
    assert ours.config.num_loops == used["num_loops"]
    for num_loops in (1, 2, 4):
        wanted = looped_logits(theirs, TOKENS, num_loops, used["skip_loop_final_norm"])
        assert (ours(TOKENS, num_loops=num_loops).logits - wanted).abs().max() < 1e-4
    check_round_trip(NANBEIGE, ours.config, tmp_path / "again")
    written = export_config(NANBEIGE, ours.config)
    assert {k: v for k, v in written.items() if used.get(k, v) != v} == {}
    check_generation(ours.config, num_loops=1)
    check_generation(ours.config, num_loops=8)


def test_the_published_nanbeige() -> None:
    """4.17B parameters; keys and values of both loops: 2 x 22 x 2 x 8 x 128 numbers a token."""
    config = read_nanbeige_config(NANBEIGE_3B)
    layer = 3072 * (48 + 2 * 8 + 48) * 128 + 3 * 3072 * 10752 + 2 * 3072
    wanted = 2 * 166144 * 3072 + 22 * layer + 3072
    assert counts.total_params(config) == wanted == 4_169_800_704
    assert counts.kv_bytes_per_token(config) == 2 * (2 * 22 * 2 * 8 * 128)
    assert config.effective_depth() == 44


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_mhc": True}, "enable_mhc is True; only False is supported"),
        ({"loop_loss_weights": [0.5]}, "loop_loss_weights is [0.5]"),
        ({"emb_neighbor_num": 2}, "emb_neighbor_num is 2"),
        ({"kv_channels": 4}, "kv_channels is 4, but head_dim 8"),
        ({"num_loops": 0}, "num_loops is 0"),
        ({"num_streams": 3}, "unknown num_streams"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ],
)
def test_what_no_published_nanbeige_uses_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        read_nanbeige_config(SMALL_NANBEIGE | change)
    assert message in str(error.value)
    off = {"enable_mhc": False, "qk_layernorm": False, "emb_neighbor_num": None}
    assert read_nanbeige_config(SMALL_NANBEIGE | off) == read_nanbeige_config(SMALL_NANBEIGE)
