"""Load a checkpoint folder in our own format; ``interop`` loads those of other model families.

All names and shapes are checked before any weight is read, and all weights are checked before the
model is returned.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openmythos.checkpoint.parts import own_box, own_values
from openmythos.checkpoint.save import FORMAT, FORMAT_VERSION
from openmythos.checkpoint.weights import (
    ADAPTER_FILE,
    COMPILED,
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredWeights,
    check_shapes,
    read_json,
    stored_bytes,
    tensor_shapes,
)
from openmythos.config import ModelConfig
from openmythos.config.schema import from_dict, require
from openmythos.folder import MANIFEST_FILE, PathLike, damage, old_name
from openmythos.model.adapter import base_tensors
from openmythos.model.int8 import Int8Weight, int8_names
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.plan.memory import require_memory

NEEDED = (CONFIG_FILE, WEIGHTS_FILE)
WEIGHTS = ("stored", "int8")


def checkpoint_folder(path: PathLike, *, verify: bool = True) -> Path:
    """The checkpoint folder for ``path``: itself or, for a run folder, its newest checkpoint.

    Args:
        path: The folder.
        verify: If true, damaged checkpoints of a run are left out, each with a warning.

    Raises:
        ValueError: There is none.
    """
    folder = Path(os.path.realpath(path))
    if not folder.exists() and old_name(folder).is_dir():
        folder = old_name(folder)  # a writer was killed between its two renames
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{path} {what}; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if (folder / "checkpoints").is_dir():  # a run folder
        found = newest_checkpoint(folder) if verify else max(run_checkpoints(folder), default=None)
        if found is None:
            raise ValueError(f"{path} is a run that has written no checkpoint yet")
        return found
    return folder


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def newest_checkpoint(
    run: Path,
    needed: tuple[str, ...] = NEEDED,
    damage_of: Callable[[Path], str | None] | None = None,
) -> Path | None:
    """The newest checkpoint of a run folder that is not damaged; None if there is none at all.

    A damaged one is left out with a warning.

    Args:
        run: The run folder.
        needed: Files that a checkpoint must have; safetensors may be in parts.
        damage_of: What looks for damage; None: ``checkpoint_damage``.

    Raises:
        ValueError: All are damaged.
    """
    complaints: list[str] = []
    for folder in reversed(run_checkpoints(run)):
        lost = [f"{name} is missing" for name in needed if not _has(folder, name)]
        problem = lost[0] if lost else (damage_of or checkpoint_damage)(folder)
        if problem is None:
            if complaints:
                warnings.warn(f"{'; '.join(complaints)}; {folder} is used instead", stacklevel=2)
            return folder
        complaints.append(f"{folder} is damaged: {problem}")
    if complaints:
        raise ValueError(f"{'; '.join(complaints)}; no other checkpoint is left in {run}")
    return None


def _has(folder: Path, name: str) -> bool:
    """Whether a checkpoint has a file, or a first part of it; the manifest knows the others.

    An adapter may stand for the weights.
    """
    if name == WEIGHTS_FILE and (folder / ADAPTER_FILE).is_file():
        return True
    parts = folder.glob(f"{name.removesuffix('.safetensors')}-rank-*")
    return (folder / name).is_file() or (name.endswith(".safetensors") and any(parts))


def checkpoint_damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What differs from a checkpoint's manifest, in words; None if nothing does; see ``damage``.

    Checkpoints of the first version of the format, and those of other families, may have none.
    """
    if not (folder / MANIFEST_FILE).is_file():
        with contextlib.suppress(ValueError):  # a config that cannot be read is another error
            stored = read_config(folder)
            ours = stored.get("format") == FORMAT
            if ours and stored.get("format_version") in range(2, FORMAT_VERSION + 1):
                return f"{MANIFEST_FILE} is missing"
    return damage(folder, share)


def verify_checkpoint(folder: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        ValueError: A file is missing or differs.
    """
    problem = checkpoint_damage(folder)
    if problem is not None:
        raise ValueError(
            f"{folder} is damaged: {problem}; if the change was meant, openmythos convert {folder} "
            "--no-verify --out NEW writes it as a new checkpoint"
        )


def dtype_for(
    weights: str, dtype: torch.dtype | None, device: torch.device | str
) -> torch.dtype | None:
    """The dtype of the parameters that are not in 8 bits: beside int8 it is fp32.

    Raises:
        ValueError: int8 beside another dtype or on another device, or neither int8 nor stored.
    """
    require(weights in WEIGHTS, "weights", weights, " or ".join(WEIGHTS))
    if weights == "stored":
        return dtype
    require(torch.device(device).type == "cpu", "device", str(device), "cpu with weights in int8")
    allowed = "None or torch.float32 with weights in int8"
    require(dtype in (None, torch.float32), "dtype", dtype, allowed)
    return torch.float32


def require_room(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    weights: str = "stored",
) -> None:
    """Check that a folder's weights fit into memory, before they are read.

    Raises:
        ValueError: They do not.
    """
    if torch.device(device).type == "cpu":
        needed = 0
        with contextlib.suppress(ValueError):  # weights that are no weights are another error
            needed = stored_bytes(folder, torch.int8 if weights == "int8" else dtype)
        advice = "take a smaller model, or a machine with more memory"
        require_memory(needed, f"loading {folder}", advice)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict, of any model family.

    Raises:
        ValueError: It is missing or is not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {CONFIG_FILE}")
    return read_json(path)


class _WithoutInit(TorchFunctionMode):
    """Skips ``torch.nn.init``, which on the meta device only imports modules that take 80 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def empty_model(config: ModelConfig) -> RecurrentDepthLM:
    """A model on the meta device, without memory for weights, to be given to ``fill_model``."""
    with torch.device("meta"), _WithoutInit():
        return RecurrentDepthLM(config)


@torch.no_grad()
def fill_model(
    model: RecurrentDepthLM,
    tensors: Iterable[tuple[str, Tensor]],
    where: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    in_int8: Collection[str] = (),
) -> RecurrentDepthLM:
    """Give a model from ``empty_model`` its weights, one at a time: memory holds only one copy.

    Args:
        model: The model without weights.
        tensors: Every entry of the model's state dict once, as (name, tensor); the model may keep
            the tensors themselves.
        where: The source, for error messages.
        dtype: Dtype of the parameters; None: as stored. Buffers always keep their stored dtype.
        device: Device of parameters and buffers.
        in_int8: Names of parameters that are stored in 8 bits; the others then need no gradient.

    Raises:
        ValueError: A dtype that is not floating, or weights that are too large for it.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating dtype")
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in in_int8:
            Int8Weight.put(module, leaf, tensor)
        elif leaf in module._parameters:
            cast = tensor.to(device, dtype).contiguous()
            if dtype == torch.float16 and not bool(cast.isfinite().all()):
                raise ValueError(f"{where}: {name} has weights that are too large for {dtype}")
            setattr(module, leaf, nn.Parameter(cast, requires_grad=not in_int8))
        else:
            setattr(module, leaf, tensor.to(device))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:  # not stored: counts that start at 0
                setattr(module, name, torch.zeros_like(buffer, device=device))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    return model.eval()


@torch.no_grad()
def load_weights(model: RecurrentDepthLM, path: PathLike) -> None:
    """Copy a checkpoint's weights into a model, which keeps its dtype, its device and its adapter.

    Over ranks, each of them copies and reads what it holds of the model.

    Raises:
        ValueError: As ``load_checkpoint``; the model is then unchanged.
    """
    folder = checkpoint_folder(path)
    ours = {name.replace(COMPILED, ""): part for name, part in base_tensors(model).items()}
    weights = StoredWeights(folder)
    check_shapes(weights.shapes, tensor_shapes(ours), folder)
    for name, tensor in ours.items():
        weights.read_part(name, own_box(tensor))  # refuses what is not finite
    for name, tensor in ours.items():
        own_values(tensor).copy_(weights.read_part(name, own_box(tensor)))


def load_checkpoint(
    path: PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
    weights: str = "stored",
) -> RecurrentDepthLM:
    """Load a folder written by ``save_pretrained``; ``interop`` loads other model families as well.

    Args:
        path: The folder, or a run folder.
        dtype: Dtype of the parameters; None keeps the stored one.
        device: Device of the model.
        verify: Compare the SHA-256 of every file with ``manifest.json`` (about 1 GB/s).
        weights: "int8": matrices in 8 bits, for computing on a CPU; the rest is in fp32.

    Raises:
        ValueError: Not such a folder, or its files are damaged, incomplete or do not match.
    """
    dtype = dtype_for(weights, dtype, device)
    require_room(checkpoint_folder(path, verify=False), dtype, device, weights)
    folder = checkpoint_folder(path, verify=verify)
    if verify:
        verify_checkpoint(folder)
    model, files = open_checkpoint(folder)
    in_int8 = int8_names(model) if weights == "int8" else set()
    cast = dict.fromkeys((name for name, _ in model.named_parameters()), dtype)
    names = sorted(files.shapes, key=lambda name: files.size([name]), reverse=True)
    stored = (
        (n, files.read(n) if n in in_int8 else files.read(n).to(dtype=cast.get(n), copy=True))
        for n in names
    )
    return fill_model(model, stored, files.folder, dtype, device, in_int8)


def open_checkpoint(path: PathLike) -> tuple[RecurrentDepthLM, StoredWeights]:
    """An empty model, and the stored weights, whose names and shapes have been checked against it.

    Raises:
        ValueError: As ``load_checkpoint``, except for weights that are not finite.
    """
    folder = checkpoint_folder(path)
    data = read_config(folder)
    form, version = data.pop("format", None), data.pop("format_version", None)
    if form != FORMAT or version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"{folder / CONFIG_FILE} has format {form!r}, version {version!r}; "
            f"this program reads {FORMAT!r}, versions 1 to {FORMAT_VERSION}"
        )
    try:
        config = from_dict(ModelConfig, data)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    weights, model = StoredWeights(folder), empty_model(config)
    check_shapes(weights.shapes, tensor_shapes(model.state_dict()), folder)
    return model, weights
