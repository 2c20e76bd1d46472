import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openmythos.checkpoint.save import save_pretrained
from openmythos.config import ModelConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.interop.adapter import (
    base_of,
    chosen_layers,
    new_adapter,
    restore_adapter,
    save_adapter,
    weights_digest,
)
from openmythos.interop.adapter import trained as own_tensors
from openmythos.interop.export import export_hf
from openmythos.interop.loading import (
    load_config,
    load_pretrained,
    own_tokenizer,
    usable_tokenizer,
)
from openmythos.model.adapter import changes_of
from openmythos.tokenizer import byte_tokenizer
from tests.interop.hf.examples import DENSE, LATENT, SPARSE
from tests.interop.trained_adapter import trained
from tests.strategies import random_model, random_tokens

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.core.0.self_attn.q_proj"


def stored(folder: Path, config: ModelConfig = DENSE, seed: int = 0) -> Path:
    return save_pretrained(random_model(config, seed=seed), folder)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, not those that are mapped to the file."""
    return {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}


def changed(folder: Path, **fields: Any) -> None:
    """Other settings in an adapter's folder."""
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    (folder / SETTINGS).write_text(json.dumps({**settings, **fields}), encoding="utf-8")


# --- names ----------------------------------------------------------------------------------------


def test_targets_are_names_of_layers_or_of_what_they_are_in() -> None:
    usual = chosen_layers(DENSE, AdapterConfig())
    assert {layer.name.rpartition(".")[2] for layer in usual} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    core = [layer.name for layer in chosen_layers(DENSE, AdapterConfig(targets=("core",)))]
    assert core == [layer.name for layer in usual if layer.name.startswith("model.core.")]
    (only,) = chosen_layers(DENSE, AdapterConfig(targets=("core.1.self_attn.v_proj",)))
    assert (only.matrix, only.start, only.shape) == ("core.1.attention.qkv.weight", 24, (8, 16))
    assert [x.name for x in chosen_layers(SPARSE, AdapterConfig()) if ".experts" in x.name] == []


@pytest.mark.parametrize(
    ("target", "nearest"), [("q_porj", "q_proj"), ("core.7.mlp", "core.1.mlp"), ("???", "q_proj")]
)
def test_a_target_that_matches_nothing_gets_the_nearest_names(target: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="nearest names are") as said:
        chosen_layers(DENSE, AdapterConfig(targets=("q_proj", target)))
    assert repr(target) in str(said.value) and nearest in str(said.value)
    assert "\n" not in str(said.value)


# --- the folder -----------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_has_pefts_spread() -> None:
    model, tokens = random_model(DENSE), random_tokens(DENSE, 2, 9)
    with torch.no_grad():
        before = model(tokens).logits
        new_adapter(model, AdapterConfig(rank=8), "base", seed=1)
        assert torch.equal(model(tokens).logits, before)
    downs = [c.down for each in changes_of(model).values() for c in each]
    spread = torch.cat([down.flatten() * down.shape[1] ** 0.5 for down in downs]).std()
    assert abs(spread - 3**-0.5) < 0.02


@pytest.mark.parametrize("config", [DENSE, LATENT, SPARSE], ids=["dense", "latent", "sparse"])
def test_a_stored_adapter_loads_merged_and_the_base_is_untouched(
    tmp_path: Path, config: ModelConfig
) -> None:
    base, folder = stored(tmp_path / "base", config), tmp_path / "adapter"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    model, tokens = trained(base, folder), random_tokens(config, 2, 9)
    assert {path.name for path in folder.iterdir()} == {SETTINGS, TENSORS}
    with torch.no_grad():
        wanted = model(tokens).logits
        for loaded in (load_pretrained(folder), load_pretrained(base, adapter=folder)):
            assert (loaded(tokens).logits - wanted).abs().max() < 1e-5
    assert not loaded.training
    assert load_config(folder) == config
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    other = load_pretrained(base)
    adapter = new_adapter(other, AdapterConfig(rank=3, alpha=1.0), str(base), seed=2)
    restore_adapter(other, adapter, folder)
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, wanted)


def test_the_base_is_known_by_its_weights(tmp_path: Path) -> None:
    """Its export and its copy are the same base; the same model with other weights is none."""
    base, folder = stored(tmp_path / "base"), tmp_path / "adapter"
    trained(base, folder)
    export = export_hf(load_pretrained(base), tmp_path / "export")
    load_pretrained(export, adapter=folder)
    assert weights_digest(load_pretrained(base, dtype=torch.float64)) == weights_digest(
        load_pretrained(base)
    )
    wrong = stored(tmp_path / "wrong", seed=1)
    with pytest.raises(ValueError, match=r"is an adapter of another model than .*wrong: it was"):
        load_pretrained(wrong, adapter=folder)
    stored(base, seed=1)  # the base itself is another one now
    with pytest.raises(ValueError, match="is an adapter of another model"):
        load_pretrained(folder)


def test_a_revision_of_the_base_is_where_peft_has_it(tmp_path: Path) -> None:
    model = random_model(DENSE)
    adapter = new_adapter(model, AdapterConfig(), "owner/name@v1.0", seed=0)
    save_adapter(own_tensors(model), adapter, tmp_path)
    stored = json.loads((tmp_path / SETTINGS).read_text(encoding="utf-8"))
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("owner/name", "v1.0")
    assert base_of(tmp_path) == "owner/name@v1.0"
    changed(tmp_path, revision=None)
    assert base_of(tmp_path) == "owner/name"
    changed(tmp_path, revision="main", base_model_name_or_path=str(tmp_path.parent))
    assert base_of(tmp_path) == str(tmp_path.parent)


def test_an_adapter_alone_reads_text_as_its_base_does(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    config = replace(DENSE, vocab_size=259)
    save_pretrained(random_model(config), base, byte_tokenizer())
    trained(base, folder)
    found, remark = usable_tokenizer(folder)
    assert found is not None and not remark
    assert found.fingerprint == byte_tokenizer().fingerprint == own_tokenizer(folder).fingerprint


def test_other_precisions(tmp_path: Path) -> None:
    """The sum is done in the dtype that is asked for; 8 bits are refused with what to do."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_pretrained(random_model(DENSE).bfloat16(), base)
    model, tokens = trained(base, folder).double(), random_tokens(DENSE, 2, 9)
    with torch.no_grad():
        wide = load_pretrained(folder, dtype=torch.float64)
        assert (wide(tokens).logits - model(tokens).logits).abs().max() < 1e-12
    assert load_pretrained(folder).embed.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="openmythos convert"):
        load_pretrained(folder, weights="int8")


def test_what_is_no_plain_lora_of_the_model_is_refused(tmp_path: Path) -> None:
    base, folder = stored(tmp_path / "base"), tmp_path / "adapter"
    trained(base, folder)
    good, tensors = (folder / SETTINGS).read_bytes(), read(folder)

    def refused(words: str) -> None:
        with pytest.raises(ValueError, match=words) as said:
            load_pretrained(base, adapter=folder)
        assert "\n" not in str(said.value)
        (folder / SETTINGS).write_bytes(good)
        save_file(tensors, folder / TENSORS)

    for fields, words in (
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora True"),
        ({"lora_alpha": "much"}, "lora_alpha 'much'; it must be a number"),
        ({"lora_alpha": math.nan}, "lora_alpha nan; it must be a number, and finite"),
        ({"lora_alpha": 10**400}, "it must be a number, and finite"),
    ):
        changed(folder, **fields)
        refused(words)
    save_file({**tensors, "base_model.model.more": torch.zeros(2)}, folder / TENSORS)
    refused(r"what .*base does not have, or what cannot be adapted: base_model\.model\.more")
    wide = torch.zeros(3, 17)
    save_file({**tensors, f"{Q}.lora_A.weight": wide}, folder / TENSORS)
    refused("the adapter is of another model")
    for down, up in ((3, 16), (16, 3, 1)), ((16,), (3,)), ((0, 16), (16, 0)), ((3, 16), (16, 2)):
        parts = {f"{Q}.lora_A.weight": torch.ones(down), f"{Q}.lora_B.weight": torch.ones(up)}
        save_file({**tensors, **parts}, folder / TENSORS)
        refused("they are no two matrices of one rank")
    save_file({**tensors, f"{Q}.lora_A.weight": torch.full((3, 16), torch.nan)}, folder / TENSORS)
    refused("something else than finite numbers")
    (folder / TENSORS).write_bytes(b"no tensors")
    refused("truncated or damaged")
    (folder / TENSORS).unlink()
    refused(r"has no adapter_model\.safetensors")
    changed(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say of which model"):
        load_pretrained(folder)
    changed(folder, base_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="that is the adapter itself: put the model back there"):
        load_pretrained(folder)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    changed(folder, base_model_name_or_path=str(other))
    with pytest.raises(ValueError, match="that is the adapter itself in the end"):
        load_pretrained(folder)


def test_ranks_by_layer_and_rank_stabilised_scales_are_read(tmp_path: Path) -> None:
    base, folder = stored(tmp_path / "base"), tmp_path / "adapter"
    trained(base, folder, alpha=6.0, targets=("q_proj",))
    tensors = read(folder)
    down, up = (tensors[f"{Q}.lora_{part}.weight"] for part in "AB")
    tensors[f"{Q}.lora_A.weight"] = torch.cat((down, torch.zeros(1, 16)))
    tensors[f"{Q}.lora_B.weight"] = torch.cat((up, torch.ones(16, 1)), dim=1)
    save_file(tensors, folder / TENSORS)
    changed(folder, use_rslora=True)
    before = load_pretrained(base).core[0].attention.qkv.weight[:16]
    found = load_pretrained(base, adapter=folder).core[0].attention.qkv.weight[:16]
    assert torch.allclose(found, before + 3 * up @ down, atol=1e-5)
    other = [load_pretrained(f).core[1].attention.qkv.weight[:16] for f in (base, folder)]
    down, up = (tensors[f"{Q.replace('core.0', 'core.1')}.lora_{part}.weight"] for part in "AB")
    assert torch.allclose(other[1], other[0] + 6.0 / 3**0.5 * up @ down, atol=1e-5)
