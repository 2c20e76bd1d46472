"""Models by their name on the Hugging Face hub. Weights and JSON are fetched, never code."""

import os
import re
from pathlib import Path

from openmythos.checkpoint.load import checkpoint_folder
from openmythos.folder import PathLike

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SAFE_FILES = ["*.json", "*.safetensors"]
TORCH_FILES = ["*.bin", "*.pt", "*.pth"]  # read as tensors only


def local_folder(path: PathLike) -> Path:
    """The folder to read for ``path``, which may be a model's name on the hub: ``owner/name``.

    What exists here is never looked up there, nor is a path whose first folder exists.

    Raises:
        ValueError: There is no such folder, and no such model, or the hub cannot be reached.
    """
    name = os.fspath(path)
    if not HUB_NAME.fullmatch(name) or Path(name).exists() or Path(name).parent.exists():
        return checkpoint_folder(path)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=SAFE_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=SAFE_FILES + TORCH_FILES))
    except Exception as error:  # network, hub and access errors have no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} is no folder here, and could not be fetched from the Hugging Face hub "
            f"({reason}); give a folder, or go online and check the name"
        ) from None
    return checkpoint_folder(folder)
