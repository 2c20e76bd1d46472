"""Load a checkpoint of any supported family."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmythos.checkpoint.load import (
    dtype_for,
    empty_model,
    fill_model,
    load_checkpoint,
    open_checkpoint,
    read_config,
    require_room,
    verify_checkpoint,
)
from openmythos.checkpoint.save import FORMAT
from openmythos.checkpoint.weights import CONFIG_FILE, StoredWeights
from openmythos.config import ModelConfig
from openmythos.folder import PathLike
from openmythos.interop import export
from openmythos.interop.adapter import base_of, is_adapter
from openmythos.interop.families import (
    huginn,
    ifm_looped_lm,
    llama,
    looplm_135m,
    openmythos_original,
    ouro,
    parcae,
)
from openmythos.interop.families.not_loaded import why_not
from openmythos.interop.gguf import PARTS_FIELD, GgufWeights
from openmythos.interop.hub import ZOO_FOLDER, local_folder
from openmythos.interop.mapping import Family, read_tensors
from openmythos.interop.peft import merge_adapter, merged_config
from openmythos.model.int8 import int8_names
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import TOKENIZER_FILE, has_tokenizer

FAMILIES = (
    openmythos_original.FAMILY,
    huginn.FAMILY,
    huginn.RETROFITTED,
    ouro.FAMILY,
    parcae.FAMILY,
    parcae.GPT_FAMILY,
    llama.LLAMA,
    llama.NANBEIGE,
    ifm_looped_lm.FAMILY,
    looplm_135m.FAMILY,
    export.FAMILY,
)


def load_pretrained(
    path: PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
    weights: str = "stored",
    adapter: PathLike | None = None,
) -> RecurrentDepthLM:
    """Load a checkpoint folder: ours, one of a family in ``FAMILIES``, or an adapter's.

    Args:
        path: A folder with config.json and the weights, a ``.gguf`` file of a Llama, ``zoo:NAME``
            of a model that ships, or a model's name on the Hugging Face hub. Of a folder with an
            adapter only, the base that it names is loaded, and the adapter merged into it.
        dtype: Dtype of the parameters; None keeps the stored one, and is fp32 for a GGUF file and
            for the models that ship, whose bf16 only saves space.
        device: Device of the model.
        verify: Compare the files of one of our checkpoints with the SHA-256 in its manifest.json
            (about 1 GB/s); of a run, a damaged newest checkpoint falls back to the one before it.
        weights: "int8": matrices in 8 bits with one scale per output channel, for computing on a
            CPU in a quarter of the memory; the rest is in fp32. They are rounded as they are read.
        adapter: A folder or run with an adapter of this model, ours or PEFT's, to merge into it.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: There is no such folder, the family is unknown, files are damaged, weights do
            not fit the config (all names are listed), or weights are not finite.
    """
    dtype, found = dtype_for(weights, dtype, device), local_folder(path, verify=False)
    if adapter is None and is_adapter(found):
        adapter, path = path, base_of(found)
    if adapter is not None:
        return _load_adapted(path, adapter, dtype, device, verify, weights)
    require_room(found, dtype, device, weights)
    folder = local_folder(path, verify=verify)
    if dtype is None and folder.parent == ZOO_FOLDER:
        dtype = torch.float32
    if verify:
        verify_checkpoint(folder)
    if "format" in read_config(folder):
        return load_checkpoint(folder, dtype=dtype, device=device, verify=verify, weights=weights)
    model, tensors = open_foreign(folder, dtype)
    in_int8 = int8_names(model) if weights == "int8" else ()
    return fill_model(model, tensors, folder, dtype, device, in_int8)


def _load_adapted(
    path: PathLike,
    adapter: PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    verify: bool,
    weights: str,
) -> RecurrentDepthLM:
    """A base with an adapter merged into it, as ``load_pretrained``."""
    if weights != "stored":
        raise ValueError(
            f"{adapter} is an adapter, which is not merged into weights in 8 bits: merge it first, "
            f"openmythos convert {adapter} --out MERGED, and load that"
        )
    folder = local_folder(adapter, verify=verify)
    if verify:
        verify_checkpoint(folder)
    model = load_pretrained(path, device=device, verify=verify)
    if dtype is None:
        return merge_adapter(model, folder, path, FAMILIES)
    for parameter in model.parameters():  # rounded once, after the sum
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    model = merge_adapter(model, folder, path, FAMILIES)
    empty = empty_model(model.config)
    return fill_model(empty, model.state_dict().items(), folder, dtype, device)


def load_config(path: PathLike) -> ModelConfig:
    """The config of a checkpoint folder of any family; names and shapes of its weights are checked.

    Raises:
        ValueError: As ``load_pretrained``, except for weights that are not finite.
    """
    folder = local_folder(path)
    if is_adapter(folder):
        return merged_config(load_config(base_of(folder)), folder)
    if "format" in read_config(folder):
        return open_checkpoint(folder)[0].config
    return open_foreign(folder, None)[0].config


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of one of our checkpoints or exports; None for other families' folders."""
    folder = _or_base(folder)
    data = read_config(folder)
    ours = "format" in data or data.get("model_type") == export.MODEL_TYPE
    return Tokenizer.load(folder) if ours and (folder / TOKENIZER_FILE).is_file() else None


def usable_tokenizer(folder: Path) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a folder of any family; or None, and the reason for a person."""
    folder = _or_base(folder)
    if not has_tokenizer(folder):
        return None, f"{folder} has no {TOKENIZER_FILE}; the result has none either"
    try:
        return Tokenizer.load(folder), ""
    except ValueError as error:
        return None, f"the tokenizer is left out: {error}"


def _or_base(folder: Path) -> Path:
    """The folder; of an adapter alone, as PEFT writes it, that of its base."""
    alone = is_adapter(folder) and not (folder / CONFIG_FILE).is_file()
    return local_folder(base_of(folder)) if alone else folder


def family_of(path: PathLike) -> Family | None:
    """The published family of a checkpoint; None if it is ours or of no known one."""
    folder = local_folder(path)
    return None if "format" in read_config(folder) else _recognised(folder)[2]


def _recognised(
    folder: Path,
) -> tuple[dict[str, Any], StoredWeights | GgufWeights, Family | None]:
    """The config.json of a checkpoint that is not ours, its weights, and the family of both."""
    data = read_config(folder)
    parts = data.pop(PARTS_FIELD, None)
    weights = StoredWeights(folder) if parts is None else GgufWeights(parts, data)
    return data, weights, next((f for f in FAMILIES if f.recognises(data, weights.shapes)), None)


def open_foreign(
    folder: Path, dtype: torch.dtype | None
) -> tuple[RecurrentDepthLM, Iterator[tuple[str, Tensor]]]:
    """Of another family's folder, the empty model and its weights to come, which fit it by shape.

    Raises:
        ValueError: The family is unknown, or names or shapes do not fit; while weights are read, as
            ``load_pretrained``.
    """
    data, weights, family = _recognised(folder)
    if family is None and (reason := why_not(data)) is not None:
        raise ValueError(f"{weights.folder}: {reason}; docs/families/README.md lists what loads")
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
        raise ValueError(f"{weights.folder} (read as {family.name}): {error}") from None
    model = empty_model(config)
    return model, read_tensors(family, model, weights, dtype)
