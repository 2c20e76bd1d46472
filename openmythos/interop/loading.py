"""Load a checkpoint of any supported family."""

from pathlib import Path
from typing import Any

import torch

from openmythos.checkpoint import (
    CONFIG_FILE,
    FORMAT,
    PathLike,
    StoredWeights,
    checkpoint_folder,
    empty_model,
    fill_model,
    load_checkpoint,
    read_config,
)
from openmythos.config import ModelConfig
from openmythos.interop import huginn, llama, openmythos_original, ouro
from openmythos.interop.mapping import Family, read_tensors
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.schema import from_dict

FAMILIES = (
    openmythos_original.FAMILY,
    huginn.FAMILY,
    huginn.RETROFITTED,
    ouro.FAMILY,
    llama.LLAMA,
    llama.NANBEIGE,
)


def load_pretrained(
    path: PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RecurrentDepthLM:
    """Load a checkpoint folder: ours, or one of a family in ``FAMILIES``.

    Args:
        path: A folder with config.json and the weights.
        dtype: Of the parameters; None keeps what is stored.
        device: Of the model.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: No such folder, an unknown family, damaged files, weights that do not fit the
            config (all names are listed), or weights that are not finite.
    """
    folder = checkpoint_folder(path)
    data = read_config(folder)
    if "format" in data:
        return load_checkpoint(folder, dtype=dtype, device=device)
    weights = StoredWeights(folder)
    family = _family(folder, data, weights)
    model = empty_model(_family_config(family, folder, data))
    return fill_model(model, read_tensors(family, model, weights), folder, dtype, device)


def load_config(path: PathLike) -> ModelConfig:
    """The model's config of a checkpoint folder, ours or another family's, without its weights.

    Raises:
        ValueError: No such folder, an unknown family, or a config that cannot be used.
    """
    folder = checkpoint_folder(path)
    data = read_config(folder)
    if "format" not in data:
        return _family_config(_family(folder, data, StoredWeights(folder)), folder, data)
    fields = {name: v for name, v in data.items() if name not in ("format", "format_version")}
    try:
        return from_dict(ModelConfig, fields)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None


def _family(folder: Path, data: dict[str, Any], weights: StoredWeights) -> Family:
    family = next((f for f in FAMILIES if f.recognises(data, weights.shapes)), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise ValueError(
            f"{folder / CONFIG_FILE} is of no known family: it has no format={FORMAT!r}, and with "
            f"its weights it does not match {known}"
        )
    return family


def _family_config(family: Family, folder: Path, data: dict[str, Any]) -> ModelConfig:
    try:
        return family.read_config(data)
    except ValueError as error:
        raise ValueError(f"{folder} (read as {family.name}): {error}") from None
