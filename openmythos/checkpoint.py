"""Checkpoint folders: model.safetensors, config.json and, optionally, tokenizer.json.

Writing replaces a whole folder at once. Reading checks every name and shape before it reads a
weight, and every weight before it returns a model. The folders of other families are the matter of
``interop``, which uses ``empty_model`` and ``fill_model`` from here.
"""

import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openmythos.config import ModelConfig
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.schema import from_dict, to_dict
from openmythos.stored_weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredWeights,
    check_shapes,
    listed,
    read_json,
    tensor_shapes,
)
from openmythos.tokenizer import Tokenizer

FORMAT, FORMAT_VERSION = "openmythos", 1
OWN_FILES = {CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json"}

PathLike = str | os.PathLike[str]


def save_pretrained(
    model: RecurrentDepthLM, folder: PathLike, tokenizer: Tokenizer | None = None
) -> Path:
    """Write a checkpoint folder and return its path.

    A checkpoint that is there already is replaced as a whole: after a kill at any instant the
    folder holds the complete old one or the complete new one.

    Raises:
        ValueError: The folder holds something else than a checkpoint, or the model has no weights.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model is on the meta device: it has shapes but no weights to save")
    with replaced_folder(folder) as fresh:
        save_weights(model.state_dict(), fresh)
        config = {"format": FORMAT, "format_version": FORMAT_VERSION, **to_dict(model.config)}
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(fresh)
    return Path(folder)


def save_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write model.safetensors; names that share their memory are an error of safetensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # the library makes it private to its owner


@contextlib.contextmanager
def replaced_folder(folder: PathLike, own_files: Collection[str] = OWN_FILES) -> Iterator[Path]:
    """An empty folder to write into; when the block ends well it takes the place of ``folder``.

    Until then ``folder`` is untouched. What a killed writer leaves beside it, ``.NAME.tmp``, is
    removed by the next one; two processes must not write the same folder at once.

    Raises:
        ValueError: ``folder`` holds other files than ``own_files``, those of a checkpoint.
    """
    target = Path(os.path.realpath(folder))
    _refuse_foreign(target, own_files)
    fresh, old = target.with_name(f".{target.name}.tmp"), _old_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir()
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        # Readers fall back to the old name between the two renames.
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
        fresh.rename(target)
    _sync(target.parent)
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def _refuse_foreign(target: Path, own_files: Collection[str]) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a checkpoint is a folder")
    if target.is_dir():
        foreign = sorted(path.name for path in target.iterdir() if path.name not in own_files)
        if foreign:
            names = listed(foreign)
            raise ValueError(
                f"{target} holds {names}: replacing the folder would delete that; choose another"
            )


def _old_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders; NTFS journals renames
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    swap = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        return libc.renamex_np(*names, swap) == 0
    here = -100  # AT_FDCWD
    return hasattr(libc, "renameat2") and libc.renameat2(here, names[0], here, names[1], swap) == 0


# --- reading --------------------------------------------------------------------------------------


def checkpoint_folder(path: PathLike) -> Path:
    """The folder to read for ``path``: itself, or the newest checkpoint of a run's folder.

    Raises:
        ValueError: There is none.
    """
    folder = Path(os.path.realpath(path))
    if not folder.exists() and _old_name(folder).is_dir():
        folder = _old_name(folder)  # a writer was killed between its two renames
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{path} {what}; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if (folder / "checkpoints").is_dir():  # a run
        folder = max((folder / "checkpoints").glob("step-????????"), default=folder / "none")
        if not folder.exists():
            raise ValueError(f"{path} is a run that has written no checkpoint yet")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict, whatever the family.

    Raises:
        ValueError: It is missing or is not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {CONFIG_FILE}")
    return read_json(path)


class _WithoutInit(TorchFunctionMode):
    """Leaves new layers as they are: on the meta device drawing nothing takes 80 MB of imports."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def empty_model(config: ModelConfig) -> RecurrentDepthLM:
    """The model without memory for its weights; ``fill_model`` completes it."""
    with torch.device("meta"), _WithoutInit():
        return RecurrentDepthLM(config)


@torch.no_grad()
def fill_model(
    model: RecurrentDepthLM,
    tensors: Iterable[tuple[str, Tensor]],
    where: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> RecurrentDepthLM:
    """Give a model of ``empty_model`` its weights, one at a time, so that memory holds one copy.

    Args:
        model: Without weights.
        tensors: Every entry of the model's state dict, once; the model keeps them.
        where: Named in errors.
        dtype: Of the parameters; None keeps what is stored. Buffers keep what is stored.
        device: Of everything.

    Raises:
        ValueError: A dtype that is not floating, or that cannot hold a weight.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating dtype")
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            cast = tensor.to(device, dtype).contiguous()
            if dtype == torch.float16 and not bool(cast.isfinite().all()):
                raise ValueError(f"{where}: {name} has weights that are too large for {dtype}")
            setattr(module, leaf, nn.Parameter(cast))
        else:
            setattr(module, leaf, tensor.to(device))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:  # statistics, which start at zero
                setattr(module, name, torch.zeros_like(buffer, device=device))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    return model.eval()


@torch.no_grad()
def load_weights(model: RecurrentDepthLM, path: PathLike) -> None:
    """Copy a checkpoint's weights into a model that exists; its dtype and device stay.

    Raises:
        ValueError: What ``load_checkpoint`` refuses; the model is then unchanged.
    """
    folder, ours = checkpoint_folder(path), model.state_dict()
    weights = StoredWeights(folder)
    check_shapes(weights.shapes, tensor_shapes(ours), folder)
    for name in ours:
        weights.read(name)  # refuses what is not finite
    for name, tensor in ours.items():
        tensor.copy_(weights.read(name))


def load_checkpoint(
    path: PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RecurrentDepthLM:
    """Load a folder that ``save_pretrained`` wrote; ``interop`` loads the other families too.

    Raises:
        ValueError: Not such a folder, or one that is damaged, incomplete or does not fit.
    """
    model, weights = open_checkpoint(path)
    cast = dict.fromkeys((name for name, _ in model.named_parameters()), dtype)
    names = sorted(weights.shapes, key=lambda name: weights.size([name]), reverse=True)
    stored = ((n, weights.read(n).to(dtype=cast.get(n), copy=True)) for n in names)
    return fill_model(model, stored, weights.folder, dtype, device)


def open_checkpoint(path: PathLike) -> tuple[RecurrentDepthLM, StoredWeights]:
    """The model without its weights, and the weights, whose names and shapes fit it.

    Raises:
        ValueError: What ``load_checkpoint`` refuses, save weights that are not finite.
    """
    folder = checkpoint_folder(path)
    data = read_config(folder)
    form, version = data.pop("format", None), data.pop("format_version", None)
    if form != FORMAT or version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format {form!r}, version {version!r}; "
            f"this program reads {FORMAT!r}, version {FORMAT_VERSION}"
        )
    try:
        config = from_dict(ModelConfig, data)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    weights, model = StoredWeights(folder), empty_model(config)
    check_shapes(weights.shapes, tensor_shapes(model.state_dict()), folder)
    return model, weights
