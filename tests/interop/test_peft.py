import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openmythos.checkpoint.save import save_pretrained
from openmythos.config import (
    LearnedLoopConfig,
    ModelConfig,
    SinusoidalLoopConfig,
    WeightLoRAConfig,
)
from openmythos.config.adapter import AdapterConfig
from openmythos.engine.reference import generate
from openmythos.interop.adapter import new_adapter
from openmythos.interop.export import FAMILY as EXPORT
from openmythos.interop.loading import FAMILIES, load_config, load_pretrained
from openmythos.interop.peft import write_adapter
from openmythos.model.adapter import changes_of
from openmythos.model.recurrent import RecurrentDepthLM
from tests.interop.hf.examples import BIASED_MOE, CONFIGS, DENSE
from tests.interop.trained_adapter import trained
from tests.strategies import MLA, random_model, random_tokens, randomise, small_config

GoldenDir = Callable[[str], Path]
GOLDENS = ("huginn", "ouro", "parcae", "openmythos-gqa", "openmythos-mla", "ifm-linear")
SIGNALS = {
    "learned": small_config(loop_embedding=LearnedLoopConfig(num_loops=2)),
    "sinusoidal, experts": small_config(
        loop_embedding=SinusoidalLoopConfig(num_channels=4), core_feed_forward=BIASED_MOE
    ),
    "latent": small_config(attention=MLA, loop_embedding=LearnedLoopConfig(num_loops=2)),
    "weight LoRA": small_config(loop_adapter=WeightLoRAConfig(rank=2, num_loops=2)),
}


# --- a change per loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIGNALS)
def test_changes_per_loop_are_merged_into_lora_per_loop(kind: str, tmp_path: Path) -> None:
    config = SIGNALS[kind]
    base, folder = save_pretrained(random_model(config), tmp_path / "base"), tmp_path / "adapter"
    model, tokens = trained(base, folder, num_loops=3), random_tokens(config, 2, 9)
    loaded, plain = load_pretrained(folder), load_pretrained(base)
    assert loaded.config == load_config(folder) != config
    assert loaded.config.loop_adapter.num_loops == 3
    for num_loops in (1, 2, 3, 5, [2, 5]):
        with torch.no_grad():
            wanted = model(tokens, num_loops=num_loops).logits
            found = loaded(tokens, num_loops=num_loops).logits
            assert (found - wanted).abs().max() < 1e-5
            assert (plain(tokens, num_loops=num_loops).logits - wanted).abs().max() > 0.1
    wide = load_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        assert (wide(tokens).logits - model.double()(tokens).logits).abs().max() < 1e-9


@pytest.mark.parametrize("kind", SIGNALS)
def test_generation_with_changes_per_loop_is_the_plain_forward(kind: str, tmp_path: Path) -> None:
    """Also at a depth beyond the last change, with depths in one batch, and after a conversion."""
    base = save_pretrained(random_model(SIGNALS[kind]), tmp_path / "base")
    trained(base, tmp_path / "adapter", num_loops=2)
    model = load_pretrained(tmp_path / "adapter")
    again = load_pretrained(save_pretrained(model, tmp_path / "merged"))
    prompts = [[3, 1, 4], [1, 5]]
    for num_loops in (1, 4):
        ids = generate(model, prompts, max_new_tokens=5, num_loops=num_loops).tokens
        assert ids == generate(again, prompts, max_new_tokens=5, num_loops=num_loops).tokens
        for prompt, new in zip(prompts, ids, strict=True):
            row = [*prompt]
            for token in new:
                with torch.no_grad():
                    logits = model(torch.tensor([row]), num_loops=num_loops).logits[0, -1]
                assert token == int(logits.argmax())
                row.append(token)


def test_a_slice_is_the_adapter_of_its_loop(tmp_path: Path) -> None:
    """Where only one loop runs, PEFT's plain adapter with the first slices is the same."""
    config = SIGNALS["learned"]
    base, folder = save_pretrained(random_model(config), tmp_path / "base"), tmp_path / "adapter"
    model, tokens = trained(base, folder, num_loops=3), random_tokens(config, 2, 9)
    stored = load_file(folder / "adapter_model.safetensors")
    cores = [tensor for name, tensor in stored.items() if ".core." in name]
    assert {tensor.ndim for tensor in cores} == {3} and len(stored) > len(cores)
    with pytest.raises(Exception, match="LORA_PER_LOOP"):
        peft.PeftModel.from_pretrained(nn.Linear(2, 2), folder)
    first = {n: (t[0] if t.ndim == 3 else t).clone() for n, t in stored.items()}
    save_file(first, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["peft_type"] = "LORA"
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with torch.no_grad():
        found = load_pretrained(base, adapter=folder)(tokens, num_loops=1).logits
        assert (found - model(tokens, num_loops=1).logits).abs().max() < 1e-5


def test_each_loop_trains_its_own_change(tmp_path: Path) -> None:
    config = SIGNALS["learned"]
    base = save_pretrained(random_model(config), tmp_path / "base")
    model = trained(base, tmp_path / "adapter", num_loops=3)
    model(random_tokens(config, 2, 9), num_loops=2).logits.square().mean().backward()
    for name, changes in changes_of(model).items():
        for change in changes:
            assert change.per_loop == name.startswith("core.")
            if change.per_loop:
                assert [bool(g.any()) for g in change.up.grad] == [True, True, False]


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (DENSE, {}, "adapter.num_loops is 2, and the model's loops are all the same"),
        (CONFIGS["original"], {}, "the model has output_lora where a change per loop"),
        (SIGNALS["learned"], {"targets": ("prelude",)}, "name no layer of the core .*: prelude"),
    ],
)
def test_models_without_a_change_per_loop(
    config: ModelConfig, settings: dict[str, Any], said: str
) -> None:
    adapter = AdapterConfig(num_loops=2, **settings)
    with pytest.raises(ValueError, match=said) as caught:
        new_adapter(random_model(config), adapter, "base", seed=0)
    assert "\n" not in str(caught.value)


# --- names of families ----------------------------------------------------------------------------


class StandIn(nn.Module):
    """A published model's modules by their names, without what they compute."""

    prepare_inputs_for_generation = None

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in sorted(tensors.items(), key=lambda item: "bias" in item[0]):
            *owners, leaf = name.split(".")
            module: nn.Module = self
            for at, owner in enumerate(owners):
                last = at == len(owners) - 1
                if not hasattr(module, owner):
                    made: nn.Module = nn.Module()
                    if last and tensor.ndim == 2 and leaf == "weight":
                        made = nn.Linear(*tensor.shape[::-1], bias=f"{name[:-6]}bias" in tensors)
                    module.add_module(owner, made)
                module = getattr(module, owner)
            if isinstance(module, nn.Linear):
                getattr(module, leaf).data = tensor
            else:
                module.register_buffer(leaf, tensor)


def linear_names(base: Path) -> list[str]:
    """The names of a golden's linear layers; embeddings and a tied head are none."""
    stored = load_file(base / "model.safetensors")
    matrices = {n[:-7]: t for n, t in stored.items() if t.ndim == 2 and n.endswith(".weight")}
    embeddings = {n: t for n, t in matrices.items() if "embed" in n or n.endswith("wte")}
    return [
        name
        for name, matrix in matrices.items()
        if not any(torch.equal(matrix, embedding) for embedding in embeddings.values())
    ]


def with_weights(base: Path, model: nn.Module, folder: Path) -> RecurrentDepthLM:
    """The golden with other weights, as its family's files, loaded."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    stored = load_file(base / "model.safetensors")
    tensors = {name: t.contiguous().clone() for name, t in model.state_dict().items()}
    assert tensors.keys() == stored.keys()
    save_file(tensors, folder / "model.safetensors")
    return load_pretrained(folder)


@pytest.mark.parametrize("name", GOLDENS)
@torch.no_grad()
def test_an_adapter_of_a_familys_names_loads(
    golden_dir: GoldenDir, name: str, tmp_path: Path
) -> None:
    """As PEFT merges it, onto the published folder and onto our copy of it."""
    base = golden_dir(name)
    model = load_pretrained(base)
    theirs = StandIn(load_file(base / "model.safetensors"))
    lora = peft.LoraConfig(r=4, lora_alpha=2, target_modules=linear_names(base))
    tuned = peft.get_peft_model(theirs, lora)
    with torch.enable_grad():
        changed = nn.ParameterList(p for p in tuned.parameters() if p.requires_grad)
    randomise(changed, seed=3)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    wanted_model = with_weights(base, tuned.merge_and_unload(), tmp_path / "merged")
    tokens = random_tokens(model.config, 2, 9)
    wanted = wanted_model(tokens).logits
    ours = save_pretrained(model, tmp_path / "ours")
    for each in (base, ours):
        found = load_pretrained(each, adapter=tmp_path / "adapter")(tokens).logits
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (model(tokens).logits - wanted).abs().max() > 0.01


@pytest.mark.parametrize("name", GOLDENS)
@torch.no_grad()
def test_our_adapter_under_a_familys_names(
    golden_dir: GoldenDir, name: str, tmp_path: Path
) -> None:
    """PEFT takes every tensor of it and merges what ours computes unmerged."""
    base, folder = golden_dir(name), tmp_path / "adapter"
    model = trained(base, folder)
    stored = load_file(base / "model.safetensors")
    data = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (family, *_) = (f for f in FAMILIES if f.recognises(data, stored.keys()))
    write_adapter(folder, model.config, family, tmp_path / "theirs")
    theirs = StandIn(stored)
    tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "theirs")  # warns if names are left
    added = {n for n in tuned.state_dict() if "lora_" in n}
    written = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {n.replace(".default", "") for n in added} == written.keys()
    found = with_weights(base, tuned.merge_and_unload(), tmp_path / "merged")
    tokens = random_tokens(model.config, 2, 9)
    wanted = model(tokens).logits
    for each in (found, load_pretrained(base, adapter=tmp_path / "theirs")):
        assert (each(tokens).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (load_pretrained(base)(tokens).logits - wanted).abs().max() > 0.01


def test_names_of_the_export_and_what_cannot_be_written(tmp_path: Path) -> None:
    base, folder = save_pretrained(random_model(DENSE), tmp_path / "base"), tmp_path / "adapter"
    model, tokens = trained(base, folder), random_tokens(DENSE, 2, 9)
    out = write_adapter(folder, DENSE, EXPORT, tmp_path / "copy")
    with torch.no_grad():
        found = load_pretrained(base, adapter=out)(tokens).logits
        assert (found - model(tokens).logits).abs().max() < 1e-5
    (ouro,) = (family for family in FAMILIES if family.name == "Ouro")
    with pytest.raises(ValueError, match="Ouro cannot express this model"):
        write_adapter(folder, DENSE, ouro, tmp_path / "no")
    learned = SIGNALS["learned"]
    per_loop = save_pretrained(random_model(learned), tmp_path / "learned")
    trained(per_loop, tmp_path / "loops", num_loops=2)
    with pytest.raises(ValueError, match="a change per loop, which PEFT cannot express"):
        write_adapter(tmp_path / "loops", learned, EXPORT, tmp_path / "no")
    other = replace(learned, num_core_layers=1)
    wrong = save_pretrained(random_model(other), tmp_path / "wrong")
    with pytest.raises(ValueError, match="adapter of another model"):
        load_pretrained(wrong, adapter=tmp_path / "loops")
    assert not (tmp_path / "no").exists()
