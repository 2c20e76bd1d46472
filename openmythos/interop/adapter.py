"""Adapters as folders in PEFT's format, under the names of the Hugging Face export.

PEFT loads such a folder onto the export of the base, and what it trained there loads here. The
base's weights are not copied: a folder says where they lie, and their SHA-256.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from openmythos.checkpoint.load import empty_model
from openmythos.checkpoint.parts import own_box, own_values, whole_values
from openmythos.checkpoint.save import save_tensors
from openmythos.checkpoint.weights import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    WEIGHTS_FILE,
    StoredTensors,
    check_shapes,
    read_json,
    tensor_shapes,
)
from openmythos.config import ModelConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.folder import listed, write_json
from openmythos.interop import export
from openmythos.interop.mapping import Join, Rename
from openmythos.model.adapter import LowRank, adapt, adapted_weights, base_tensors
from openmythos.model.attention import LatentExpansion
from openmythos.model.feedforward import Router
from openmythos.model.init import normal_rows
from openmythos.model.loop_signal import LoopLinear
from openmythos.model.recurrent import RecurrentDepthLM

PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
DIGEST = "base_sha256"  # in the metadata of the adapter's safetensors file
# Fields of adapter_config.json that change what is computed, and the values that change nothing.
PLAIN: dict[str, Any] = {
    "bias": ("none",),
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias"), (False, None)),
    **dict.fromkeys(
        ("modules_to_save", "alpha_pattern", "layer_replication", "trainable_token_indices"),
        (None, {}, []),
    ),
}


@dataclass(frozen=True)
class Layer:
    """A linear layer under its name in the export: some rows of one of our matrices.

    ``is_usual`` says whether it is adapted where no targets are named.
    """

    name: str
    matrix: str
    start: int
    shape: tuple[int, int]
    is_usual: bool


@dataclass(frozen=True)
class Adapter:
    """What an adapter is of: its settings, where its base lies, and the digest of the base."""

    config: AdapterConfig
    base: str
    digest: str


def layers(config: ModelConfig) -> list[Layer]:
    """The layers of a model that can be adapted."""
    model, found = empty_model(config), []
    for rule in export.rules(config):
        if not isinstance(rule, Join | Rename) or not rule.ours[0].endswith(".weight"):
            continue
        (matrix,) = rule.ours
        module = model.get_submodule(matrix.removesuffix(".weight"))
        if not isinstance(module, nn.Linear) or isinstance(module, Router):
            continue
        num_rows, num_in = module.weight.shape
        sizes = rule.sizes if isinstance(rule, Join) else None
        sizes = sizes or (num_rows // len(rule.theirs),) * len(rule.theirs)
        usual = isinstance(module, LoopLinear | LatentExpansion)
        for number, (name, size) in enumerate(zip(rule.theirs, sizes, strict=True)):
            start = sum(sizes[:number])
            name = name.removesuffix(".weight")
            found.append(Layer(name, matrix, start, (size, num_in), usual))
    return found


def chosen_layers(config: ModelConfig, targets: Sequence[str]) -> list[Layer]:
    """The layers that targets name, see ``AdapterConfig``.

    Raises:
        ValueError: A target names none; the nearest names are in the message.
    """
    known = layers(config)
    if not targets:
        return [layer for layer in known if layer.is_usual]
    for target in targets:
        if not any(_is_in(layer, target) for layer in known):
            parts = {layer.name.rpartition(".")[2]: None for layer in known}
            longer = [layer.name.removeprefix("model.") for layer in known]
            close = difflib.get_close_matches(target, [*parts, *longer], n=3) or list(parts)
            raise ValueError(
                f"adapter.targets: no layer of the model is called {target!r}, or is in what is "
                f"called so; the nearest names are {', '.join(close)}"
            )
    return [layer for layer in known if any(_is_in(layer, target) for target in targets)]


def _is_in(layer: Layer, target: str) -> bool:
    return f".{target}." in f".{layer.name}."


def new_adapter(model: RecurrentDepthLM, config: AdapterConfig, base: str, seed: int) -> Adapter:
    """Freeze a model and give it an adapter, unless it has one; the new one changes nothing yet.

    Args:
        model: The base. Over ranks it was laid out with its adapter, and all of them call this.
        config: The adapter's settings.
        base: Where the base lies, as ``load_pretrained`` takes it.
        seed: Seed of the down-projections; their spread is PEFT's.

    Raises:
        ValueError: A target names no layer.
    """
    if not adapted_weights(model):
        draw_adapter(model, config, seed)
    return Adapter(config, base, weights_digest(model))


def draw_adapter(model: RecurrentDepthLM, config: AdapterConfig, seed: int) -> None:
    """Freeze a model, with values or without, and give it an adapter that changes nothing yet.

    Raises:
        ValueError: A target names no layer.
    """
    chosen = chosen_layers(model.config, config.targets)
    changes: dict[str, list[LowRank]] = {}
    like, rows = model.embed.weight, torch.arange(config.rank)
    place = {"dtype": like.dtype, "device": "cpu" if like.is_meta else like.device}
    for layer in chosen:
        num_out, num_in = layer.shape
        down = (3 * num_in) ** -0.5 * normal_rows(seed, layer.name, rows, num_in)
        up = torch.zeros(num_out, config.rank)
        change = LowRank(down.to(**place), up.to(**place), layer.start, config.scale)
        changes.setdefault(layer.matrix, []).append(change)
    adapt(model, changes)


def weights_digest(model: nn.Module) -> str:
    """The SHA-256 of a model's weights as fp32, without its adapter: names, shapes and numbers.

    It is that of the model's export or conversion, too, as long as its numbers are the same. Over
    ranks all of them call it, and hold one whole tensor at a time.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        tensor = whole_values(tensor)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        numbers = tensor.detach().cpu().float().contiguous()
        digest.update(numbers.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the folder -----------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / WEIGHTS_FILE).is_file()


def base_of(folder: Path) -> str:
    """Where an adapter's base lies.

    Raises:
        ValueError: The adapter does not say it.
    """
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder} is an adapter that does not say of which model: load the model with "
            f"adapter={str(folder)!r}"
        )
    return base


def save_adapter(tensors: Mapping[str, Tensor], adapter: Adapter, folder: Path) -> None:
    """Write the two files of an adapter, whose tensors ``trained`` has, into a temporary folder."""
    names = [name.removeprefix(PREFIX) for name in tensors if name.endswith(DOWN)]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [name.removesuffix(DOWN) for name in names],
    }
    write_json(folder / ADAPTER_CONFIG, settings)
    save_tensors(tensors, folder / ADAPTER_FILE, {DIGEST: adapter.digest})


def trained(model: RecurrentDepthLM) -> dict[str, Tensor]:
    """The tensors of a model's adapter by PEFT's names."""
    weights = adapted_weights(model)
    by_place = {
        (name, change.start): change
        for name, weight in weights.items()
        for change in weight.changes
    }
    found: dict[str, Tensor] = {}
    for layer in layers(model.config):
        if (change := by_place.get((layer.matrix, layer.start))) is not None:
            found[PREFIX + layer.name + DOWN] = change.down
            found[PREFIX + layer.name + UP] = change.up
    return found


@torch.no_grad()
def restore_adapter(model: RecurrentDepthLM, adapter: Adapter, folder: Path) -> None:
    """Copy a stored adapter's numbers into that of a model.

    Raises:
        ValueError: The file is damaged, or of another base or other layers.
    """
    stored, expected = _open(folder, adapter.digest, adapter.base), trained(model)
    check_shapes(stored.shapes, tensor_shapes(expected), folder)
    for name, tensor in expected.items():
        own_values(tensor).copy_(stored.read_part(name, own_box(tensor)))


def add_adapter(model: RecurrentDepthLM, folder: Path, base: object) -> None:
    """Give a model the adapter in a folder, ours or PEFT's, to be merged; ``base`` is its name.

    The adapter keeps its dtype.

    Raises:
        ValueError: It is of another base, of layers that the model does not have, or of a kind that
            cannot be added.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    scale = _scale(settings, folder)
    stored = _open(folder, weights_digest(model), base)
    changes: dict[str, list[LowRank]] = {}
    used = set()
    for layer in layers(model.config):
        names = (PREFIX + layer.name + DOWN, PREFIX + layer.name + UP)
        if not all(name in stored.shapes for name in names):
            continue
        used |= {*names}
        down, up = (stored.read(name).to(model.embed.weight.device, copy=True) for name in names)
        rank = len(down)
        if (up.shape[0], down.shape[1]) != layer.shape or up.shape[1] != rank:
            raise ValueError(
                f"{folder} changes {layer.name} by {list(up.shape)} x {list(down.shape)}, and it "
                f"is {list(layer.shape)} in {base}: the adapter is of another model"
            )
        change = LowRank(down, up, layer.start, scale(rank))
        changes.setdefault(layer.matrix, []).append(change)
    if left := sorted(stored.shapes.keys() - used):
        raise ValueError(
            f"{folder} changes what {base} does not have, or what cannot be adapted: {listed(left)}"
        )
    adapt(model, changes)


def _scale(settings: Mapping[str, Any], folder: Path) -> Any:
    """The factor of a change by its rank.

    Raises:
        ValueError: The adapter is no plain LoRA.
    """
    where = folder / ADAPTER_CONFIG
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{where} has peft_type {settings.get('peft_type')!r}; only LORA is read")
    for name, plain in PLAIN.items():
        if name in settings and settings[name] not in plain:
            raise ValueError(f"{where} has {name} {settings[name]!r}; only plain LoRA is read")
    alpha = settings.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"{where} has lora_alpha {alpha!r}; it must be a number")
    return lambda rank: alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _open(folder: Path, digest: str, base: object) -> StoredTensors:
    """An adapter's tensors; what is not finite, or of another base, is refused."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {ADAPTER_FILE}; an adapter's weights must be in it")
    stored = StoredTensors([path])
    with safetensors.safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(DIGEST)
    if said not in (None, digest):
        raise ValueError(
            f"{folder} is an adapter of another model than {base}: it was trained on weights with "
            f"the SHA-256 {said[:12]}, and these have {digest[:12]}; give the model that it was "
            "trained on"
        )
    for name in stored.shapes:
        tensor = stored.read(name)
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} holds something else than finite numbers")
    return stored
