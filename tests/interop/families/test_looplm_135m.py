import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openmythos.config import (
    AddInjectionConfig,
    LTIInjectionConfig,
    ModelConfig,
    NormalInitConfig,
    ZerosInitConfig,
)
from openmythos.config.schema import apply_overrides
from openmythos.interop.families.looplm_135m import FAMILY, read_config, rules
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import export_config
from openmythos.model.recurrent import RecurrentDepthLM
from tests.interop.families.examples import (
    cached_logits,
    check_generation,
    check_round_trip,
    check_same_bytes,
    write_folder,
)

GoldenDir = Callable[[str], Path]
GOLDENS = ("looplm-naive", "looplm-parcae")


def from_zero(golden: Path) -> RecurrentDepthLM:
    """The golden's model, with the zero state that its numbers were computed from."""
    model = load_pretrained(golden)
    assert model.config.state_init == NormalInitConfig(std=0.02)
    model.config = replace(model.config, state_init=ZerosInitConfig())
    return model


@pytest.mark.parametrize("name", GOLDENS)
@torch.no_grad()
def test_logits_are_looplms(golden_dir: GoldenDir, name: str) -> None:
    model, expected = from_zero(golden_dir(name)), load_file(golden_dir(name) / "io.safetensors")
    tokens = expected["input_ids"]
    for num_loops in (1, 4, 6):
        logits = expected[f"logits_T{num_loops}"]
        assert logits.abs().max() > 5
        assert (model(tokens, num_loops=num_loops).logits - logits).abs().max() < 1e-4
    found = cached_logits(model, tokens, 6, [9, 4] + [1] * 8)
    assert (found - expected["logits_T6"]).abs().max() < 1e-4
    # One depth per row, as their ``T_per_seq``.
    mixed = model(tokens, num_loops=[1, 4, 6]).logits
    for row, num_loops in enumerate((1, 4, 6)):
        assert (mixed[row] - expected[f"logits_T{num_loops}"][row]).abs().max() < 1e-4


def test_goldens_are_both_variants(golden_dir: GoldenDir) -> None:
    naive, parcae = (load_pretrained(golden_dir(name)).config for name in GOLDENS)
    assert (naive.injection, naive.prelude_norm) == (AddInjectionConfig(), False)
    assert (parcae.injection, parcae.prelude_norm) == (LTIInjectionConfig(), True)
    for config in (naive, parcae):
        layers = (config.num_prelude_layers, config.num_core_layers, config.num_coda_layers)
        assert (layers, config.attention.qk_norm) == ((4, 1, 2), "weighted")


@pytest.mark.parametrize("name", GOLDENS)
def test_export_gives_the_same_bytes(golden_dir: GoldenDir, name: str) -> None:
    check_same_bytes(FAMILY, golden_dir(name))
    config = json.loads((golden_dir(name) / "config.json").read_text(encoding="utf-8"))
    written = export_config(FAMILY, load_pretrained(golden_dir(name)).config)
    assert written == {k: v for k, v in config.items() if k != "preset"}


def test_the_hubs_prefix_is_dropped(golden_dir: GoldenDir, tmp_path: Path) -> None:
    golden = golden_dir("looplm-naive")
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    stored = load_file(golden / "model.safetensors")
    released = {f"model.{key}": tensor for key, tensor in stored.items()}
    model = load_pretrained(write_folder(tmp_path / "hub", config, released))
    assert torch.equal(model.core[0].attention.qkv.weight, stored["loop.attn.qkv.weight"])


SHAPES = {
    "naive": [],
    "Parcae's injection, a norm before it": ["injection=lti", "prelude_norm=true"],
    "other depths and heads": [
        *("num_prelude_layers=1", "num_coda_layers=0", "num_loops=2", "attention.num_heads=4"),
        *("attention.num_kv_heads=1", "attention.qk_norm=none", "rope.theta=500.0"),
    ],
    "a head of its own": ["tie_embeddings=false"],
}


def looplm(golden_dir: GoldenDir, *changes: str) -> ModelConfig:
    data = json.loads((golden_dir("looplm-naive") / "config.json").read_text(encoding="utf-8"))
    return apply_overrides(read_config(data), list(changes))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=list(SHAPES))
def test_other_shapes_go_there_and_back(
    golden_dir: GoldenDir, tmp_path: Path, changes: list[str]
) -> None:
    check_round_trip(FAMILY, looplm(golden_dir, *changes), tmp_path / "there")


def test_generation_with_a_cache_is_that_without(golden_dir: GoldenDir) -> None:
    check_generation(looplm(golden_dir), 3)


PUBLISHED = {  # looplm/config.py, the preset 135M with the overrides of README's training command
    "vocab_size": 50304,
    "d_model": 1024,
    "n_prelude": 4,
    "n_coda": 2,
    "mu_rec": 6,
    "n_q_heads": 16,
    "n_kv_heads": 8,
    "head_dim": 64,
    "qk_norm": True,
    "rope_theta": 10000.0,
    "dense_ffn": 2816,
    "tie_embeddings": True,
    "final_z_loss_coef": 1e-4,
    "use_a_matrix": False,
    "use_input_norm": False,
    "init_std": 0.02,
    "preset": "135M",
}


def test_the_published_shape_has_its_count() -> None:
    config = read_config(PUBLISHED | {"model_type": "looplm", "auto_map": {}, "dtype": "float32"})
    with torch.device("meta"):
        model = RecurrentDepthLM(config)
    block = 1024 * (16 + 2 * 8) * 64 + 16 * 64 * 1024 + 3 * 1024 * 2816 + 2 * 1024 + 2 * 64
    total = 50304 * 1024 + 7 * block + 1024
    assert sum(p.numel() for p in model.parameters()) == total == 134_102_912
    assert {name for rule in rules(config) for name in getattr(rule, "theirs", ())} >= {
        "loop.attn.q_norm.weight",
        "coda.1.ffn.w2.weight",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu_rec": 6.0}, "mu_rec is 6.0, expected a whole number"),
        ({"qk_norm": None}, "qk_norm is None, expected true or false"),
        ({"n_experts": 4}, "unknown n_experts"),
        ({"n_kv_heads": 5}, "num_kv_heads"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        read_config(PUBLISHED | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("num_core_layers=2", "num_core_layers is 2, there 1"),
        ("injection=linear", "injection.kind is 'linear', there 'add'"),
        ("state_init.std=1.0", "state_init.std is 1.0, there 0.02"),
        ("max_seq_len=2048", "max_seq_len is 2048, there 1024"),
        ("attention.qk_norm=weightless", "attention.qk_norm is 'weightless', there 'none'"),
        ("rope=null", "this model lacks one of them"),
    ],
)
def test_models_that_looplm_cannot_express(
    golden_dir: GoldenDir, change: str, message: str
) -> None:
    with pytest.raises(ValueError, match="LoopLM-135M") as error:
        export_config(FAMILY, looplm(golden_dir, change))
    assert message in str(error.value)
