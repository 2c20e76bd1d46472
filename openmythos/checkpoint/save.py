"""Write a checkpoint folder: model.safetensors, config.json and, optionally, a tokenizer.

Its manifest.json, which is written last, holds the SHA-256 of each of them.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from openmythos.checkpoint.weights import COMPILED, CONFIG_FILE, WEIGHTS_FILE
from openmythos.config.schema import to_dict
from openmythos.folder import (
    MANIFEST_FILE,
    PathLike,
    replaced_folder,
    write_json,
    write_manifest,
)
from openmythos.model.int8 import Int8Weight
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import GENERATION_FILE, SETTINGS_FILE, TOKENIZER_FILE

# A checkpoint of version 2 has a manifest.json; without it, it is damaged.
FORMAT, FORMAT_VERSION = "openmythos", 2
EXIT_FILE, EXIT_PICTURE = "exit.json", "exit.png"  # what calibrate-exit writes
OWN_FILES = {
    *(CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE),
    *(EXIT_FILE, EXIT_PICTURE),  # they are of the weights that were there before
    *(TOKENIZER_FILE, SETTINGS_FILE, GENERATION_FILE),
}


def save_pretrained(
    model: RecurrentDepthLM, folder: PathLike, tokenizer: Tokenizer | None = None
) -> Path:
    """Write a checkpoint folder and return its path.

    An existing checkpoint is replaced as a whole: if the process is killed, the folder holds either
    the complete old one or the complete new one.

    Raises:
        ValueError: The folder holds other files than a checkpoint's, or the model has no weights,
            or has them in 8 bits.
    """
    with replaced_folder(folder, OWN_FILES) as fresh:
        write_checkpoint(model, fresh, tokenizer)
        write_manifest(fresh)
    return Path(folder)


def write_checkpoint(model: RecurrentDepthLM, fresh: Path, tokenizer: Tokenizer | None) -> None:
    """Write a checkpoint's files into ``fresh``, a temporary folder that the caller renames.

    Raises:
        ValueError: The model has no weights, or they are in 8 bits.
    """
    require_stored(model)
    save_weights(model.state_dict(), fresh)
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **to_dict(model.config)}
    write_json(fresh / CONFIG_FILE, config)
    if tokenizer is not None:
        tokenizer.save(fresh)


def require_stored(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be written.

    Raises:
        ValueError: It has none, or has them in 8 bits.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model is on the meta device: it has shapes but no weights to write")
    if any(isinstance(module, Int8Weight) for module in model.modules()):
        raise ValueError(
            "the model's weights are in 8 bits, which are for computing only: load the checkpoint "
            'with weights="stored" to write it'
        )


def save_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write model.safetensors; safetensors raises an error if tensors share memory."""
    plain = {
        name.replace(COMPILED, ""): tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    save_tensors(plain, folder / WEIGHTS_FILE)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file into a temporary folder.

    Raises:
        OSError: It cannot be written, for example because the disk is full.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(0o644)  # safetensors lets only the owner read it
