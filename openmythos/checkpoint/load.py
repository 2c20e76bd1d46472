"""Read a checkpoint folder of our own format; ``interop`` reads those of other families.

Every name and shape is checked before a weight is read, and every weight before a model is
returned.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openmythos.checkpoint.save import FORMAT, FORMAT_VERSION
from openmythos.checkpoint.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredWeights,
    check_shapes,
    read_json,
    tensor_shapes,
)
from openmythos.config import ModelConfig
from openmythos.config.schema import from_dict
from openmythos.folder import PathLike, old_name
from openmythos.model.recurrent import RecurrentDepthLM


def checkpoint_folder(path: PathLike) -> Path:
    """The folder to read for ``path``: itself, or the newest checkpoint of a run's folder.

    Raises:
        ValueError: There is none.
    """
    folder = Path(os.path.realpath(path))
    if not folder.exists() and old_name(folder).is_dir():
        folder = old_name(folder)  # a writer was killed between its two renames
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
