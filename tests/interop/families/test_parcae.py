import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from openmythos.checkpoint.load import empty_model
from openmythos.config import ModelConfig, NormalInitConfig, ZerosInitConfig, counts
from openmythos.config.presets import preset
from openmythos.config.schema import apply_overrides
from openmythos.engine.reference import generate
from openmythos.interop.families.parcae import (
    FAMILY,
    GPT_FAMILY,
    read_config,
    read_gpt_config,
    rules,
)
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import (
    Dead,
    Family,
    Recomputed,
    TiedCopy,
    export_config,
    export_tensors,
)
from openmythos.model.cache import KVCache, PerLoop
from openmythos.model.recurrent import RecurrentDepthLM

Json = dict[str, Any]
GoldenDir = Callable[[str], Path]
DEPTHS = [1, 4, 8, 16]


def golden_config(golden_dir: GoldenDir) -> Json:
    return json.loads((golden_dir("parcae") / "config.json").read_text(encoding="utf-8"))


# --- the golden -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_loops", DEPTHS)
@torch.no_grad()
def test_logits_are_the_originals(golden_dir: GoldenDir, num_loops: int) -> None:
    """They reach 27 in size; fp32 in another order of sums differs by 2e-5."""
    model, expected = load_pretrained(golden_dir("parcae")), golden_io(golden_dir)
    tokens, logits = expected["input_ids"], expected[f"logits_T{num_loops}"]
    assert (model(tokens, num_loops=num_loops).logits - logits).abs().max() < 1e-4
    cache = KVCache(model.config, batch_size=3, max_len=21, max_loops=num_loops)
    parts = [
        model(chunk, num_loops=num_loops, ctx=model.context(chunk, cache=cache)).logits
        for chunk in tokens.split([9, 4] + [1] * 8, dim=1)
    ]
    assert (torch.cat(parts, dim=1) - logits).abs().max() < 1e-4


def golden_io(golden_dir: GoldenDir) -> dict[str, Tensor]:
    return load_file(golden_dir("parcae") / "io.safetensors")


def test_every_stored_tensor_is_used_or_named_as_skipped(golden_dir: GoldenDir) -> None:
    stored = load_file(golden_dir("parcae") / "model.safetensors")
    declared = rules(read_config(golden_config(golden_dir)))
    skipped = {
        rule.their_name for rule in declared if isinstance(rule, TiedCopy | Recomputed | Dead)
    }
    used = [name for rule in declared for name in getattr(rule, "theirs", ())]
    assert skipped == {"lm_head.weight", "freqs_cis"}
    assert len(used) == len(set(used))
    assert {*used, *skipped} == stored.keys()
    assert not skipped & {*used}


def test_export_gives_the_same_bytes(golden_dir: GoldenDir) -> None:
    model = load_pretrained(golden_dir("parcae"))
    stored = load_file(golden_dir("parcae") / "model.safetensors")
    del stored["freqs_cis"]
    exported = export_tensors(FAMILY, model)
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config, written = golden_config(golden_dir), export_config(FAMILY, model.config)
    assert {name: written.get(name) for name in config} == config | {"name": "parcae"}
    assert written["_class_name"] == "ParcaeConfig"
    assert read_config(written) == model.config


def test_dtypes(golden_dir: GoldenDir) -> None:
    expected = golden_io(golden_dir)
    half = load_pretrained(golden_dir("parcae"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    error = half(expected["input_ids"], num_loops=4).logits.float() - expected["logits_T4"]
    assert error.square().mean().sqrt() < 0.1
    wide = load_pretrained(golden_dir("parcae"), dtype=torch.float64)
    error = wide(expected["input_ids"], num_loops=4).logits - expected["logits_T4"]
    assert error.abs().max() < 1e-4


# --- generation -----------------------------------------------------------------------------------

PROMPTS = [[7, 200, 31, 5, 90, 12, 255], [3], [77, 78, 79, 80]]


@pytest.mark.parametrize("num_loops", [1, 8])
@pytest.mark.parametrize("state_init", ["zeros", "normal"])
def test_greedy_generation_with_a_cache_is_that_without(
    golden_dir: GoldenDir, num_loops: int, state_init: str
) -> None:
    """Also with a random initial state, which the original draws anew at every step."""
    model = load_pretrained(golden_dir("parcae"))
    if state_init == "normal":
        model.config = replace(model.config, state_init=NormalInitConfig(std=0.5))

    def run(prompts: list[list[int]], use_cache: bool) -> Any:
        return generate(
            model,
            prompts,
            max_new_tokens=8,
            num_loops=num_loops,
            use_cache=use_cache,
            cache_layout=PerLoop() if use_cache else None,
            return_logits=True,
        )

    plain, cached = run(PROMPTS, False), run(PROMPTS, True)
    assert cached.tokens == plain.tokens
    alone = [run([prompt], True).tokens[0] for prompt in PROMPTS]
    assert alone == plain.tokens
    model.double()
    plain, cached = run(PROMPTS, False), run(PROMPTS, True)
    assert cached.tokens == plain.tokens
    for a, b in zip(plain.logits, cached.logits, strict=True):
        assert (a - b).abs().max() < 1e-9


# --- other shapes ---------------------------------------------------------------------------------

SHAPE: Json = {
    "n_embd": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 50,
    "padding_multiple": 16,
    "block_size": 32,
    "norm_class_name": "RMSNorm",
    "nonlin_name": "ReLU2",
    "init_strategy": "scaled-zero",
    "qk_norm": True,
    "tie_embeddings": True,
    "norm_eps": 1e-5,
}
LOOPED: Json = SHAPE | {
    "_class_name": "ParcaeConfig",
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 2,
    "n_layers_in_coda": 2,
    "mean_recurrence": 3,
    "mean_backprop_depth": 2,
    "recurrent_embedding_dimension": 32,
    "recurrent_intermediation_embedding_dimension": 48,
    "prelude_norm": True,
    "state_init": "like-init",
    "injection_type": "diagonal",
}


def layers(prelude: int, core: int, coda: int, backprop_depth: int, recurrence: int = 8) -> Json:
    return {
        "n_layers_in_prelude": prelude,
        "n_layers_in_recurrent_block": core,
        "n_layers_in_coda": coda,
        "mean_backprop_depth": backprop_depth,
        "mean_recurrence": recurrence,
    }


SHAPES: dict[str, Json] = {
    "one layer each": layers(1, 1, 1, 2, 3),
    "odd layers, tables of prelude and core dead": layers(2, 3, 2, 4),
    "odd layers, table of the coda dead": layers(2, 3, 2, 3),
    "no prelude, no coda": layers(0, 2, 0, 1, 2),
    "odd core and odd recurrence, no table in use": layers(1, 3, 1, 2, 5),
    "untied, one head, no QK-norm, no prelude norm, a wide core": {
        "tie_embeddings": False,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "qk_norm": False,
        "prelude_norm": False,
        "recurrent_intermediation_embedding_dimension": 80,
        "recurrent_num_attention_heads": 1,
        "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 777.5},
        "padded_vocab_size": 53,
    },
}
GPT_SHAPES: dict[str, Json] = {
    "even": {"n_layer": 4},
    "odd, untied": {"n_layer": 3, "tie_embeddings": False},
    "one layer, wide": {"n_layer": 1, "n_embd": 40, "intermediate_size": 21, "norm_eps": 1e-6},
}
BOTH = [
    *(pytest.param(FAMILY, LOOPED | change, id=name) for name, change in SHAPES.items()),
    *(pytest.param(GPT_FAMILY, SHAPE | change, id=name) for name, change in GPT_SHAPES.items()),
]


def random_tensors(family: Family, shape: Json) -> dict[str, Tensor]:
    """Weights under the family's names, the dead ones not zero either."""
    model = empty_model(family.read_config(shape))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) / 4
        for name, tensor in export_tensors(family, model).items()
    }
    if shape["tie_embeddings"]:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    return tensors


def write_folder(folder: Path, shape: Json, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def dead(config: ModelConfig) -> set[str]:
    return {rule.their_name for rule in rules(config) if isinstance(rule, Dead)}


@pytest.mark.parametrize(("family", "shape"), BOTH)
@torch.no_grad()
def test_other_shapes_go_there_and_back(tmp_path: Path, family: Family, shape: Json) -> None:
    tensors = random_tensors(family, shape)
    model = load_pretrained(write_folder(tmp_path / "first", shape, tensors))
    exported = export_tensors(family, model)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        written = exported[name]
        unused = family is FAMILY and name in dead(model.config)
        assert torch.equal(written, torch.zeros_like(tensor) if unused else tensor), name
    written = export_config(family, model.config)
    again = load_pretrained(write_folder(tmp_path / "second", written, exported))
    assert again.config == model.config
    tokens = torch.arange(12).view(2, 6) * 4
    for num_loops in (1, 5):
        logits = model(tokens, num_loops=num_loops).logits
        assert torch.equal(again(tokens, num_loops=num_loops).logits, logits)
        assert logits.isfinite().all() and logits.std() > 0.1


@pytest.mark.parametrize(
    ("shape", "tables", "gates"),
    [
        (layers(2, 2, 2, 4), set(), set()),
        (layers(2, 3, 2, 4), {0, 2, 4}, {"prelude.1", "core_block.1"}),
        (layers(2, 3, 2, 3), {6}, {"coda.0"}),
        (layers(1, 3, 1, 2, 5), {0, 2, 4}, {"core_block.0", "core_block.2"}),
        (layers(4, 4, 4, 3, 7), set(), set()),
    ],
)
def test_tables_and_gates_without_a_partner_are_named(
    shape: Json, tables: set[int], gates: set[str]
) -> None:
    config = read_config(LOOPED | shape)
    expected = {f"value_embeds.{layer}.weight" for layer in tables}
    expected |= {f"transformer.{place}.attn.ve_gate.weight" for place in gates}
    assert dead(config) == expected
    used = set(range(config.num_layers - 1, -1, -2)) - tables
    found = config.value_embedding.layers if config.value_embedding else ()
    assert set(found) == used


@torch.no_grad()
def test_dead_tensors_change_nothing_and_must_be_there(tmp_path: Path) -> None:
    shape = LOOPED | layers(2, 3, 2, 4)
    tensors, tokens = random_tensors(FAMILY, shape), torch.arange(8)[None]
    logits = load_pretrained(write_folder(tmp_path / "a", shape, tensors))(tokens).logits
    tensors["value_embeds.0.weight"] += 1
    tensors["transformer.prelude.1.attn.ve_gate.weight"] += 1
    same = load_pretrained(write_folder(tmp_path / "a", shape, tensors))(tokens).logits
    assert torch.equal(same, logits)
    tensors["value_embeds.6.weight"] += 1
    other = load_pretrained(write_folder(tmp_path / "a", shape, tensors))(tokens).logits
    assert not torch.allclose(other, logits)
    del tensors["value_embeds.0.weight"]
    tensors["value_embeds.2.weight"] = torch.zeros(3)
    write_folder(tmp_path / "a", shape, tensors)
    message = r"missing: value_embeds\.0\.weight; wrong shape: value_embeds\.2\.weight is \[3\]"
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "a")


# --- against the formulas of the reference --------------------------------------------------------


def norm(x: Tensor, weight: Tensor | None = None, eps: float = 2.0**-23) -> Tensor:
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def rotate(x: Tensor) -> Tensor:
    """[T, H, K]: pairs (2j, 2j + 1) as complex numbers, base 50,000."""
    width = x.shape[-1]
    angles = torch.arange(len(x))[:, None] * 50_000 ** (-torch.arange(0, width, 2).double() / width)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def gpt_logits(w: dict[str, Tensor], tokens: Tensor, num_layers: int, heads: int) -> Tensor:
    """A GPT baseline in plain torch for one row of tokens, from their names."""
    x = w["transformer.wte.weight"][tokens]
    for layer in range(num_layers):
        at = f"transformer.h.{layer}."
        n = norm(x, w[at + "norm_1.weight"], 1e-5)
        q, k, v = ((n @ w[f"{at}attn.c_{p}.weight"].T).unflatten(-1, (heads, -1)) for p in "qkv")
        if f"value_embeds.{layer}.weight" in w:
            gate = 2 * torch.sigmoid(n[:, :32] @ w[at + "attn.ve_gate.weight"].T)
            table = w[f"value_embeds.{layer}.weight"][tokens]
            v = v + gate[..., None] * table.unflatten(-1, (heads, -1))
        q, k = norm(rotate(q)), norm(rotate(k))
        scores = torch.einsum("qhk,shk->hqs", q, k) / q.shape[-1] ** 0.5
        hidden = torch.full_like(scores, float("-inf")).triu(1)
        y = torch.einsum("hqs,shk->qhk", (scores + hidden).softmax(-1), v)
        x = x + y.flatten(1) @ w[at + "attn.c_proj.weight"].T
        wide = norm(x, w[at + "norm_2.weight"], 1e-5) @ w[at + "mlp.fc.weight"].T
        x = x + (0.5 * functional.relu(wide).square()) @ w[at + "mlp.proj.weight"].T
    return norm(x, w["transformer.ln_f.weight"], 1e-5) @ w["lm_head.weight"].T


@pytest.mark.parametrize("num_layers", [1, 3, 4])
@torch.no_grad()
def test_a_gpt_baseline_is_its_formulas(tmp_path: Path, num_layers: int) -> None:
    shape = SHAPE | {"n_layer": num_layers, "tie_embeddings": False}
    tensors = {name: t.double() for name, t in random_tensors(GPT_FAMILY, shape).items()}
    model = load_pretrained(write_folder(tmp_path / "gpt", shape, tensors))
    tokens = torch.arange(9) * 5
    expected = gpt_logits(tensors, tokens, num_layers, heads=4)
    assert (model(tokens[None]).logits[0] - expected).abs().max() < 1e-9


# --- published configurations ---------------------------------------------------------------------

SIZES = {
    "140m": (768, 6, 2, 144_323_136, 143_141_184, 63),
    "370m": (1024, 8, 4, 388_003_328, 385_903_104, 117),
    "770m": (1280, 10, 6, 776_655_680, 773_375_040, 171),
    "1.3b": (1536, 12, 8, 1_338_591_744, 1_333_868_544, 225),
}


def published(width: int, heads: int) -> Json:
    return SHAPE | {
        "n_embd": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32_768,
        "padded_vocab_size": 32_768,
        "padding_multiple": 64,
        "block_size": 2048,
        "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50000},
    }


@pytest.mark.parametrize("size", SIZES)
def test_presets_are_the_published_models(size: str) -> None:
    width, heads, num_layers, params, baseline_params, num_tensors = SIZES[size]
    shape = LOOPED | published(width, heads) | layers(num_layers, num_layers, num_layers, 4)
    shape |= {
        "recurrent_embedding_dimension": width,
        "recurrent_intermediation_embedding_dimension": 4 * width,
    }
    config, baseline = preset(f"parcae-{size}"), preset(f"parcae-gpt-{size}")
    assert read_config(shape) == config
    assert read_gpt_config(published(width, heads) | {"n_layer": 3 * num_layers}) == baseline
    assert counts.total_params(config) == params
    assert counts.total_params(baseline) == baseline_params
    tensors = export_tensors(FAMILY, empty_model(config))
    assert len(tensors) + len(["freqs_cis"]) == num_tensors
    written = export_config(FAMILY, config)
    assert {name: written[name] for name in shape if name != "name"} == shape
    assert read_gpt_config(export_config(GPT_FAMILY, baseline)) == baseline


def test_like_init_is_the_published_spread() -> None:
    for size, sigma in {"140m": 0.0228, "370m": 0.0198, "770m": 0.0177, "1.3b": 0.0161}.items():
        state = preset(f"parcae-{size}").state_init
        assert isinstance(state, NormalInitConfig)
        assert round(state.std, 4) == sigma
    assert read_config(LOOPED | {"state_init": "zero"}).state_init == ZerosInitConfig()


# --- files as the family's programs leave them ----------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.model.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_prefixes_are_stripped(tmp_path: Path, prefix: str, name: str) -> None:
    tensors = random_tensors(FAMILY, LOOPED)
    folder = write_folder(tmp_path / "model", LOOPED, tensors)
    expected = load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    named = {prefix + key: tensor for key, tensor in tensors.items()}
    named[prefix + "freqs_cis"] = torch.ones(1, 32, 1, 4, 2)
    if name.endswith("safetensors"):
        save_file(named, folder / name)
    else:
        torch.save({"step": 3, "model": named} if name == "model.pt" else named, folder / name)
    found = load_pretrained(folder).state_dict()
    assert all(torch.equal(found[key], t) for key, t in expected.state_dict().items())


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"injection_type": "linear"}, "injection_type is 'linear'; only 'diagonal' is supported"),
        ({"nonlin_name": "GELU"}, "nonlin_name is 'GELU'; only 'ReLU2' is supported"),
        ({"qk_bias": True}, "qk_bias is True; only False is supported"),
        ({"logit_softcap": 15.0}, "logit_softcap is 15.0; only None is supported"),
        ({"state_init": "embed"}, "state_init is 'embed'; supported: 'like-init', 'zero'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; only 4 is supported here"),
        ({"recurrent_embedding_dimension": 64}, "recurrent_embedding_dimension is 64; only 32"),
        ({"recurrent_num_attention_heads": 2}, "recurrent_num_attention_heads is 2; only 4"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide n_embd=32"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must divide n_embd=32"),
        ({"rope_settings": {"use_rope": False}}, "use_rope is False; only True is supported"),
        ({"rope_settings": [1]}, "rope_settings is [1], expected an object"),
        ({"padded_vocab_size": 40}, "padded_vocab_size is 40; it must be an integer of at least"),
        ({"padding_multiple": 0}, "padding_multiple is 0; it must be at least 1"),
        ({"vocabulary": 3}, "unknown vocabulary"),
        ({"n_embd": 16, "recurrent_embedding_dimension": 16}, "gate_channels is 32"),
        ({"mean_recurrence": 0}, "num_loops is 0"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, change: Json, message: str) -> None:
    write_folder(tmp_path / "model", LOOPED | change, random_tensors(FAMILY, LOOPED))
    with pytest.raises(ValueError, match=r"model \(read as Parcae\): ") as error:
        load_pretrained(tmp_path / "model")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (FAMILY, "injection=add", "Parcae cannot express this model: injection.kind is 'add'"),
        (FAMILY, "attention.qk_norm_eps=null", "attention.qk_norm_eps is None, there 1.19"),
        (FAMILY, "feed_forward.scale=1.0", "feed_forward.scale is 1.0, there 0.5"),
        (FAMILY, "state_init.std=1.0", "state_init.std is 1.0, there 0.11"),
        (FAMILY, "value_embedding.layers=[1]", "value_embedding.layers are [1]: Parcae has no"),
        (FAMILY, "rope=null", "this model lacks one of them"),
        (GPT_FAMILY, "num_loops=2", "num_loops is 2, there 1"),
        (GPT_FAMILY, "value_embedding=null", "value_embedding.layers is None, there [1, 3]"),
    ],
)
def test_models_that_parcae_cannot_express(family: Family, change: str, message: str) -> None:
    shape = LOOPED if family is FAMILY else SHAPE | {"n_layer": 4}
    config = apply_overrides(family.read_config(shape), [change])
    with pytest.raises(ValueError, match="Parcae") as error:
        export_config(family, config)
    assert message in str(error.value)


def test_the_models_own_init_is_exported_too(tmp_path: Path) -> None:
    model = RecurrentDepthLM(read_config(LOOPED)).eval()
    shape, tensors = export_config(FAMILY, model.config), export_tensors(FAMILY, model)
    again = load_pretrained(write_folder(tmp_path / "model", shape, tensors))
    tokens = torch.arange(6)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
