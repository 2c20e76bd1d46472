"""Adapters that are trained here: folders in PEFT's format, under the names of our export.

PEFT loads such a folder onto the export of the base. The base's weights are not copied: a folder
says where they lie, and their SHA-256. Where each loop has a change of its own, tensors have a
first dimension more.
"""

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from openmythos.folder import listed, run_of, write_json
from openmythos.interop import export
from openmythos.interop.hub import HUB_NAME, local_folder
from openmythos.interop.mapping import Join, Rename
from openmythos.model.adapter import LowRank, adapt, base_tensors, changes_of
from openmythos.model.attention import LatentExpansion
from openmythos.model.feedforward import Router
from openmythos.model.init import normal_rows
from openmythos.model.loop_signal import LoopLinear
from openmythos.model.recurrent import RecurrentDepthLM

PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
PER_LOOP = "LORA_PER_LOOP"  # for "LORA": PEFT has no such kind, and refuses it
DIGEST = "base_sha256"  # in the metadata of the adapter's safetensors file


@dataclass(frozen=True)
class Layer:
    """A linear layer under its name in the export: some rows of one of our matrices.

    ``is_usual`` says whether it is adapted where no targets are named, ``is_looped`` whether it may
    have a change per loop.
    """

    name: str
    matrix: str
    start: int
    shape: tuple[int, int]
    is_usual: bool
    is_looped: bool


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
        looped = isinstance(module, LoopLinear) and matrix.startswith("core.")
        for number, (name, size) in enumerate(zip(rule.theirs, sizes, strict=True)):
            start = sum(sizes[:number])
            name = name.removesuffix(".weight")
            found.append(Layer(name, matrix, start, (size, num_in), usual, looped))
    return found


def chosen_layers(config: ModelConfig, adapter: AdapterConfig) -> list[Layer]:
    """The layers that an adapter changes.

    Raises:
        ValueError: A target names none, the nearest names are in the message; or the model cannot
            have a change per loop.
    """
    chosen = _targeted(config, adapter.targets)
    if adapter.num_loops is not None:
        has = f"adapter.num_loops is {adapter.num_loops}, and"
        if config.loop_embedding is None and config.loop_adapter is None:
            raise ValueError(
                f"{has} the model's loops are all the same: it has no loop_embedding and no "
                "loop_adapter; leave num_loops out, and all loops share the change"
            )
        if config.loop_adapter is not None and config.loop_adapter.core_lora is None:
            raise ValueError(
                f"{has} the model has {config.loop_adapter.kind} where a change per loop would be "
                "merged; leave num_loops out, and all loops share the change"
            )
        if not any(layer.is_looped for layer in chosen):
            raise ValueError(
                f"{has} the targets name no layer of the core that can have a change per loop: "
                f"{listed([*adapter.targets])}"
            )
    return chosen


def _targeted(config: ModelConfig, targets: Sequence[str]) -> list[Layer]:
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
        ValueError: As ``chosen_layers``.
    """
    if not changes_of(model):
        draw_adapter(model, config, seed)
    return Adapter(config, base, weights_digest(model))


def draw_adapter(model: RecurrentDepthLM, config: AdapterConfig, seed: int) -> None:
    """Freeze a model, with values or without, and give it an adapter that changes nothing yet.

    Raises:
        ValueError: As ``chosen_layers``.
    """
    chosen = chosen_layers(model.config, config)
    changes: dict[str, list[LowRank]] = {}
    like = model.embed.weight
    device = torch.device("cpu") if like.is_meta else like.device
    for layer in chosen:
        num_out, num_in = layer.shape
        sizes = () if config.num_loops is None or not layer.is_looped else (config.num_loops,)
        rows = torch.arange(math.prod(sizes) * config.rank)
        down = (3 * num_in) ** -0.5 * normal_rows(seed, layer.name, rows, num_in)
        down = down.view(*sizes, config.rank, num_in)
        up = torch.zeros(*sizes, num_out, config.rank)
        change = LowRank(
            down.to(device, like.dtype), up.to(device, like.dtype), layer.start, config.scale
        )
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
        ValueError: The adapter does not say it, or is its own base, directly or through others.
    """
    base = place = _named_base(folder)
    met = [run_of(folder) or folder.resolve()]
    while Path(place).exists():
        found = local_folder(place, verify=False)
        own = run_of(found) or found.resolve()
        if own in met:  # one was moved to where its base had been
            raise ValueError(
                f"{folder} is an adapter of the model in {base}, and that is the adapter itself"
                f"{' in the end' if len(met) > 1 else ''}: put the model back there, or load it "
                f"with adapter={str(folder)!r}"
            )
        if not is_adapter(found):
            break
        met.append(own)
        place = _named_base(found)
    return base


def _named_base(folder: Path) -> str:
    settings = read_json(folder / ADAPTER_CONFIG)
    base, revision = (settings.get(name) for name in ("base_model_name_or_path", "revision"))
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder} is an adapter that does not say of which model: load the model with "
            f"adapter={str(folder)!r}"
        )
    pinned = f"{base}@{revision}"
    is_pinned = isinstance(revision, str) and HUB_NAME.fullmatch(pinned)
    return pinned if is_pinned and not Path(base).exists() else base


def save_adapter(tensors: Mapping[str, Tensor], adapter: Adapter, folder: Path) -> None:
    """Write the two files of an adapter, whose tensors ``trained`` has, into a temporary folder."""
    names = [name.removeprefix(PREFIX) for name in tensors if name.endswith(DOWN)]
    num_loops = adapter.config.num_loops
    on_hub = None if Path(adapter.base).exists() else HUB_NAME.fullmatch(adapter.base)
    base, revision = (adapter.base, None) if on_hub is None else on_hub.groups()
    settings = {
        "peft_type": "LORA" if num_loops is None else PER_LOOP,
        **({} if num_loops is None else {"num_loops": num_loops}),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **({} if revision is None else {"revision": revision}),  # where PEFT has it
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
    by_place = {
        (name, change.start): change for name, each in changes_of(model).items() for change in each
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
    stored, expected = open_adapter(folder), trained(model)
    check_base(folder, adapter.digest, adapter.base)
    check_shapes(stored.shapes, tensor_shapes(expected), folder)
    for name, tensor in expected.items():
        own_values(tensor).copy_(stored.read_part(name, own_box(tensor)))


def open_adapter(folder: Path) -> StoredTensors:
    """An adapter's tensors.

    Raises:
        ValueError: There are none, they are damaged, or not finite.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {ADAPTER_FILE}; an adapter's weights must be in it")
    stored = StoredTensors([path])
    for name in stored.shapes:
        tensor = stored.read(name)
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} holds something else than finite numbers")
    return stored


def base_digest(folder: Path) -> str | None:
    """The SHA-256 of the base's weights, if the adapter says it."""
    with safetensors.safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        said: str | None = (file.metadata() or {}).get(DIGEST)
        return said


def check_base(folder: Path, digest: str, base: object) -> None:
    """Check that an adapter that says the digest of its base is of this one.

    Raises:
        ValueError: It is of another model.
    """
    said = base_digest(folder)
    if said not in (None, digest):
        raise ValueError(
            f"{folder} is an adapter of another model than {base}: it was trained on weights with "
            f"the SHA-256 {said[:12]}, and these have {digest[:12]}; give the model that it was "
            "trained on"
        )
