"""Load a checkpoint of any supported family."""

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
from openmythos.interop import hf_export, huginn, openmythos_original, ouro
from openmythos.interop.mapping import read_tensors
from openmythos.model.recurrent import RecurrentDepthLM

FAMILIES = (
    openmythos_original.FAMILY,
    huginn.FAMILY,
    huginn.RETROFITTED,
    ouro.FAMILY,
    hf_export.FAMILY,
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
    family = next((f for f in FAMILIES if f.recognises(data, weights.shapes)), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise ValueError(
            f"{folder / CONFIG_FILE} is of no known family: it has no format={FORMAT!r}, and with "
            f"its weights it does not match {known}"
        )
    try:
        config = family.read_config(data)
    except ValueError as error:
        raise ValueError(f"{folder} (read as {family.name}): {error}") from None
    model = empty_model(config)
    return fill_model(model, read_tensors(family, model, weights), folder, dtype, device)
