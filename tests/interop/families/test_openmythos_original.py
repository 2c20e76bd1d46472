import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openmythos.checkpoint.load import load_checkpoint
from openmythos.checkpoint.save import save_pretrained
from openmythos.config import ModelConfig
from openmythos.config.schema import apply_overrides
from openmythos.interop.families.openmythos_original import FAMILY, read_config, rules
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import export_config, export_tensors
from openmythos.model.cache import KVCache
from openmythos.model.recurrent import RecurrentDepthLM

GOLDENS = ["openmythos-mla", "openmythos-gqa"]
GoldenDir = Callable[[str], Path]


def cached_logits(
    model: RecurrentDepthLM, tokens: Tensor, num_loops: int, chunks: list[int]
) -> Tensor:
    rows, length = tokens.shape
    cache = KVCache(model.config, batch_size=rows, max_len=length, max_loops=num_loops)
    parts = []
    for chunk in tokens.split(chunks, dim=1):
        ctx = model.context(chunk, cache=cache)
        parts.append(model(chunk, num_loops=num_loops, ctx=ctx).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("num_loops", [1, 4, 8, 16])
@torch.no_grad()
def test_logits_are_the_originals(golden_dir: GoldenDir, name: str, num_loops: int) -> None:
    """They reach 64 in size; fp32 in another order of sums differs by 3e-5."""
    folder = golden_dir(name)
    model, expected = load_pretrained(folder), load_file(folder / "io.safetensors")
    tokens, logits = expected["input_ids"], expected[f"logits_T{num_loops}"]
    assert (model(tokens, num_loops=num_loops).logits - logits).abs().max() < 1e-4
    for chunks in ([21], [9, 4] + [1] * 8):
        found = cached_logits(model, tokens, num_loops, chunks)
        assert (found - logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", GOLDENS)
def test_export_gives_the_same_bytes(golden_dir: GoldenDir, name: str) -> None:
    folder = golden_dir(name)
    model, stored = load_pretrained(folder), load_file(folder / "model.safetensors")
    exported = export_tensors(FAMILY, model)
    assert exported.keys() == stored.keys()
    for key, tensor in stored.items():
        assert exported[key].dtype == tensor.dtype
        assert torch.equal(exported[key].view(torch.uint8), tensor.view(torch.uint8)), key
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written = export_config(FAMILY, model.config)
    assert written.keys() == config.keys()
    gqa = config["attn_type"] == "gqa"
    lost = {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
    assert {k for k in config if config[k] != written[k]} == (lost if gqa else {"n_kv_heads"})


@pytest.mark.parametrize("name", GOLDENS)
def test_our_copy_of_it_is_the_same_model(golden_dir: GoldenDir, name: str, tmp_path: Path) -> None:
    model = load_pretrained(golden_dir(name))
    again = load_pretrained(save_pretrained(model, tmp_path / "ours"))
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(again(tokens, num_loops=3).logits, model(tokens, num_loops=3).logits)
    half = load_pretrained(golden_dir(name), dtype=torch.bfloat16)
    assert half(tokens).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has format None"):
        load_checkpoint(golden_dir(name))


# --- other shapes ---------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 50,
    "dim": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 32,
    "max_loop_iters": 3,
    "prelude_layers": 1,
    "coda_layers": 1,
    "attn_type": "mla",
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 5,
    "v_head_dim": 7,
    "n_experts": 4,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 6,
    "act_threshold": 0.9,
    "rope_theta": 1000.0,
    "lora_rank": 3,
    "max_output_tokens": 7,
    "dropout": 0.1,
}
SHAPES = {
    "no prelude, three coda layers, no shared expert": {
        "prelude_layers": 0,
        "coda_layers": 3,
        "n_shared_experts": 0,
    },
    "three shared experts, all experts chosen, one head": {
        "n_heads": 1,
        "n_shared_experts": 3,
        "n_experts_per_tok": 4,
    },
    "gqa with one kv head, two prelude layers": {
        "attn_type": "gqa",
        "n_kv_heads": 1,
        "prelude_layers": 2,
    },
    "gqa with as many kv heads, one expert, odd sizes": {
        "attn_type": "gqa",
        "n_kv_heads": 4,
        "dim": 56,
        "n_experts": 1,
        "n_experts_per_tok": 1,
        "expert_dim": 5,
        "lora_rank": 1,
    },
    "too narrow for a loop embedding": {"attn_type": "gqa", "dim": 4, "n_heads": 2},
}


def random_folder(folder: Path, shape: dict) -> dict[str, Tensor]:
    """A checkpoint of the original with random weights, written without the code under test."""
    model = RecurrentDepthLM(read_config(shape))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) / 4
        for name, tensor in export_tensors(FAMILY, model).items()
    }
    tensors["head.weight"] = tensors["embed.weight"].clone()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("change", SHAPES.values(), ids=list(SHAPES))
def test_other_shapes_go_there_and_back(tmp_path: Path, change: dict) -> None:
    tensors = random_folder(tmp_path / "model", SHAPE | change)
    model = load_pretrained(tmp_path / "model")
    exported = export_tensors(FAMILY, model)
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in tensors.items())
    assert read_config(export_config(FAMILY, model.config)) == model.config
    logits = model(torch.arange(10).view(2, 5) % 50, num_loops=5).logits
    assert logits.isfinite().all()


def test_known_tensors_and_their_places(tmp_path: Path) -> None:
    """Two places where a wrong order keeps every shape, against the original's formulas."""
    shape = SHAPE | {"n_shared_experts": 2}
    tensors = random_folder(tmp_path / "model", shape)
    block = load_pretrained(tmp_path / "model").core[0]
    ffn, x = "recurrent.block.ffn", torch.randn(1, 3, 24)
    expected = torch.zeros(1, 3, 24)
    for j in range(2):
        gate, up, down = (
            tensors[f"{ffn}.shared_experts.{j}.{part}.weight"] for part in ("gate", "up", "down")
        )
        expected += (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert torch.allclose(block.feed_forward.shared(x), expected, atol=1e-5)
    latent = torch.randn(1, 3, 14)
    heads = block.attention.q_up(latent).view(1, 3, 4, 5 + 6)
    attn = "recurrent.block.attn"
    nope = (latent @ tensors[f"{attn}.q_up_nope.weight"].T).view(1, 3, 4, 5)
    rope = (latent @ tensors[f"{attn}.q_up_rope.weight"].T).view(1, 3, 4, 6)
    assert torch.allclose(heads, torch.cat((nope, rope), dim=-1), atol=1e-5)


def test_every_rule_names_a_tensor_once() -> None:
    theirs = [
        name
        for rule in rules(read_config(SHAPE))
        for name in getattr(rule, "theirs", None) or (rule.their_name,)  # type: ignore[union-attr]
    ]
    assert len(theirs) == len(set(theirs))
    # 13 (P + C) + 12 + 3 (E + S) + 9 + 5 (openmythos-original.md, section 3)
    assert len(theirs) == 13 * 2 + 12 + 3 * (4 + 1) + 9 + 5


def test_state_dict_pickle_with_rotary_tables_is_read(tmp_path: Path) -> None:
    """As ``torch.save(model.state_dict())`` of the original writes it."""
    tensors = random_folder(tmp_path / "model", SHAPE)
    expected = load_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    tables = {
        "freqs_cis": torch.ones(32, 3, dtype=torch.complex64),
        "freqs_cis_mla": torch.ones(32, 3, dtype=torch.complex64),
    }
    torch.save({"step": 1, "model": tensors | tables}, tmp_path / "model" / "model.pt")
    tokens = torch.arange(4)[None]
    found = load_pretrained(tmp_path / "model")(tokens).logits
    assert torch.equal(found, expected(tokens).logits)


# --- refusals -------------------------------------------------------------------------------------


def test_wrong_weights_are_listed_by_their_names(tmp_path: Path) -> None:
    tensors = random_folder(tmp_path / "model", SHAPE)
    del tensors["recurrent.injection.log_A"], tensors["coda.0.attn.wo.weight"]
    tensors["recurrent.extra"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(23)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as error:
        load_pretrained(tmp_path / "model")
    text = str(error.value)
    assert "missing: coda.0.attn.wo.weight, recurrent.injection.log_A; " in text
    assert "unexpected: recurrent.extra; " in text
    assert "norm.weight is [23], expected [24]" in text


def test_a_head_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    tensors = random_folder(tmp_path / "model", SHAPE)
    tensors["head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.weight differs from embed\.weight"):
        load_pretrained(tmp_path / "model")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = random_folder(tmp_path / "model", SHAPE)
    tensors["recurrent.block.ffn.routed_experts.2.up.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    message = r"model\.safetensors: recurrent\.block\.ffn\.routed_experts\.2\.up\.weight holds NaN"
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type": "foo"}, "attn_type is 'foo'; allowed: 'gqa', 'mla'"),
        ({"attn_type": "gqa", "n_heads": 5}, "n_heads is 5; it must divide dim=24"),
        ({"attn_type": "gqa", "n_kv_heads": 3}, "num_kv_heads is 3"),
        ({"dim": "24"}, "dim is '24', expected a whole number"),
        ({"rope_scaling": 2}, "unknown rope_scaling"),
        ({"act_threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    random_folder(tmp_path / "model", SHAPE)
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE | change), encoding="utf-8")
    with pytest.raises(ValueError, match="read as the original OpenMythos") as error:
        load_pretrained(tmp_path / "model")
    assert message in str(error.value)


def test_unknown_families_are_named(tmp_path: Path) -> None:
    random_folder(tmp_path / "model", SHAPE)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"of no known family.*not match the original Open"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("injection=add", "injection.kind is 'add'"),
        ("halting.keep_remainder=true", "halting.keep_remainder is True"),
        ("core_feed_forward.bias_loops=2", "core_feed_forward.bias_loops is 2"),
        ("halting=null", "this model lacks one of them"),
    ],
)
def test_models_that_the_original_cannot_express(change: str, message: str) -> None:
    config: ModelConfig = apply_overrides(read_config(SHAPE), [change])
    with pytest.raises(ValueError, match="original OpenMythos") as error:
        export_config(FAMILY, config)
    assert message in str(error.value)
