"""Write a checkpoint folder: model.safetensors, config.json and, optionally, a tokenizer.

Its manifest.json, which is written last, holds the SHA-256 of each of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from openmythos.checkpoint.parts import OwnParts, places_metadata, rank_file
from openmythos.checkpoint.weights import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    COMPILED,
    CONFIG_FILE,
    WEIGHTS_FILE,
    WEIGHTS_STEM,
)
from openmythos.config import ModelConfig
from openmythos.config.schema import to_dict
from openmythos.folder import (
    DEPTH_FILE,
    HELD_OUT_FILE,
    MANIFEST_FILE,
    PUZZLE_FILE,
    WALKS_FILE,
    PathLike,
    file_record,
    replaced_folder,
    sync,
    write_json,
    write_manifest,
    write_whole,
)
from openmythos.model.int8 import Int8Weight
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import GENERATION_FILE, SETTINGS_FILE, TOKENIZER_FILE

# A checkpoint of version 2 has a manifest.json; without it, it is damaged.
FORMAT, FORMAT_VERSION = "openmythos", 2
MEASURED = EXIT_FILE, EXIT_PICTURE = "exit.json", "exit.png"  # what calibrate-exit writes
COMPANIONS = (WALKS_FILE, PUZZLE_FILE, HELD_OUT_FILE, DEPTH_FILE)
LICENCES = ("LICENSE*", "NOTICE*")
OWN_FILES = {
    *(CONFIG_FILE, WEIGHTS_FILE, ADAPTER_CONFIG, ADAPTER_FILE, MANIFEST_FILE),
    *MEASURED,  # of the weights that were there before
    *(TOKENIZER_FILE, SETTINGS_FILE, GENERATION_FILE),
}


def save_pretrained(
    model: RecurrentDepthLM,
    folder: PathLike,
    tokenizer: Tokenizer | None = None,
    *,
    companions: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint folder and return its path.

    An existing checkpoint is replaced as a whole: if the process is killed, the folder holds either
    the complete old one or the complete new one.

    Args:
        model: A model with weights.
        folder: The folder to write.
        tokenizer: A tokenizer to write beside the weights, if any.
        companions: Contents of other files to write beside them, by name.

    Raises:
        ValueError: The folder holds other files than a checkpoint's, or the model has no weights,
            or has them in 8 bits.
    """
    others = companions or {}
    with replaced_folder(folder, own_files(folder)) as fresh:
        write_checkpoint(model, fresh, tokenizer)
        write_companions({n: others[n] for n in others if n not in MEASURED}, fresh)
        write_manifest(fresh)
        # Measuring again replaces these, which damages nothing.
        write_companions({n: others[n] for n in others if n in MEASURED}, fresh)
    return Path(folder)


def own_files(folder: PathLike) -> set[str]:
    """File names that a checkpoint which is to be replaced may have."""
    path = Path(folder)
    if not (path / CONFIG_FILE).is_file():  # texts and licences there are somebody else's
        return OWN_FILES
    parts = (part.name for part in path.glob(f"{WEIGHTS_STEM}-rank-*"))
    return {*OWN_FILES, *COMPANIONS, *licences(path), *parts}


def licences(folder: Path) -> list[str]:
    """Names of the licences in a folder."""
    return sorted(path.name for pattern in LICENCES for path in folder.glob(pattern))


def read_companions(folder: Path, *, measured: bool) -> dict[str, bytes]:
    """The files that go where a checkpoint goes, besides weights, config and tokenizer, by name.

    They are the settings of its walks, texts that it was not trained on, the depths that it was
    trained at, and licences.

    Args:
        folder: The checkpoint.
        measured: Whether what calibrate-exit measured is among them, because the weights stay what
            they are.
    """
    names = [*COMPANIONS, *licences(folder), *(MEASURED if measured else ())]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write_companions(companions: Mapping[str, bytes], fresh: Path) -> None:
    """Write what ``read_companions`` read into a temporary folder."""
    for name, content in companions.items():
        write_whole(fresh / name, content)


def write_checkpoint(model: RecurrentDepthLM, fresh: Path, tokenizer: Tokenizer | None) -> None:
    """Write a checkpoint's files into ``fresh``, a temporary folder that the caller renames.

    Raises:
        ValueError: The model has no weights, or they are in 8 bits.
    """
    require_stored(model)
    save_weights(model.state_dict(), fresh)
    write_config(model.config, fresh, tokenizer)


def write_config(config: ModelConfig, fresh: Path, tokenizer: Tokenizer | None) -> None:
    """Write what a checkpoint holds besides its weights, as ``write_checkpoint``."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json(fresh / CONFIG_FILE, {**head, **to_dict(config)})
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
    save_tensors(tensors, folder / WEIGHTS_FILE)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file into a temporary folder.

    Raises:
        OSError: It cannot be written, for example because the disk is full.
    """
    plain = {
        name.replace(COMPILED, ""): tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    try:
        save_file(plain, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    if metadata:
        _sort_metadata(path)
    path.chmod(0o644)  # safetensors lets only the owner read it


def _sort_metadata(path: Path) -> None:
    """Give the same tensors the same file: safetensors writes metadata in a random order."""
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        fields = json.loads(header)
        fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
        again = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(again) <= len(header)
        file.seek(8)
        file.write(again.ljust(len(header)))


def save_parts(
    parts: OwnParts, folder: Path, stem: str, rank: int, world: int
) -> dict[str, dict[str, Any]]:
    """Write a rank's parts of tensors into a file of its own.

    Returns:
        What the manifest says of the file.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / rank_file(stem, rank, world)
    save_tensors(parts.values, path, places_metadata(parts.boxes))
    sync(path)
    return {path.name: file_record(path)}
