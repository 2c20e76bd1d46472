"""Load a checkpoint of any supported family."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from openmythos.checkpoint.load import (
    empty_model,
    fill_model,
    load_checkpoint,
    open_checkpoint,
    read_config,
)
from openmythos.checkpoint.save import FORMAT
from openmythos.checkpoint.weights import CONFIG_FILE, StoredWeights
from openmythos.config import ModelConfig
from openmythos.folder import PathLike
from openmythos.interop import export
from openmythos.interop.families import huginn, llama, openmythos_original, ouro, parcae
from openmythos.interop.hub import local_folder
from openmythos.interop.mapping import read_tensors
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import FILE_NAME, Tokenizer

FAMILIES = (
    openmythos_original.FAMILY,
    huginn.FAMILY,
    huginn.RETROFITTED,
    ouro.FAMILY,
    parcae.FAMILY,
    parcae.GPT_FAMILY,
    llama.LLAMA,
    llama.NANBEIGE,
    export.FAMILY,
)


def load_pretrained(
    path: PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RecurrentDepthLM:
    """Load a checkpoint folder: ours, or one of a family in ``FAMILIES``.

    Args:
        path: A folder with config.json and the weights, or a model's name on the Hugging Face hub.
        dtype: Of the parameters; None keeps what is stored.
        device: Of the model.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: No such folder, an unknown family, damaged files, weights that do not fit the
            config (all names are listed), or weights that are not finite.
    """
    folder = local_folder(path)
    if "format" in read_config(folder):
        return load_checkpoint(folder, dtype=dtype, device=device)
    model, tensors = _open_foreign(folder, dtype)
    return fill_model(model, tensors, folder, dtype, device)


def load_config(path: PathLike) -> ModelConfig:
    """The config of a checkpoint folder of any family, whose names and shapes fit it.

    Raises:
        ValueError: What ``load_pretrained`` refuses, save weights that are not finite.
    """
    folder = local_folder(path)
    if "format" in read_config(folder):
        return open_checkpoint(folder)[0].config
    return _open_foreign(folder, None)[0].config


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of one of our folders or exports; another project's is not ours to read."""
    data = read_config(folder)
    ours = "format" in data or data.get("model_type") == export.MODEL_TYPE
    return Tokenizer.load(folder) if ours and (folder / FILE_NAME).is_file() else None


def _open_foreign(
    folder: Path, dtype: torch.dtype | None
) -> tuple[RecurrentDepthLM, Iterator[tuple[str, Tensor]]]:
    """The model without its weights, and the weights, whose names and shapes fit it."""
    data, weights = read_config(folder), StoredWeights(folder)
    family = next((f for f in FAMILIES if f.recognises(data, weights.shapes)), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise ValueError(
            f"{folder / CONFIG_FILE} is of no known family: it has no format={FORMAT!r}, and with "
            f"its weights it does not match {known}"
        )
    weights.strip(family.prefixes)
    try:
        config = family.read_config(data)
    except ValueError as error:
        raise ValueError(f"{folder} (read as {family.name}): {error}") from None
    model = empty_model(config)
    return model, read_tensors(family, model, weights, dtype)
