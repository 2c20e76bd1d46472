"""Where a model lies: a folder, a GGUF file, with the package, or on the Hugging Face hub.

Weights, tokenizers, chat templates and licences are downloaded, never code.
"""

import os
import re
from pathlib import Path

from openmythos.checkpoint.load import checkpoint_folder
from openmythos.checkpoint.save import LICENCES
from openmythos.checkpoint.weights import CONFIG_FILE
from openmythos.folder import HELD_OUT_FILE, PathLike
from openmythos.interop.gguf import SUFFIX, open_gguf

ZOO, ZOO_FOLDER = "zoo:", Path(os.path.realpath(__file__)).parent.parent / "zoo"
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
# Templates run in a sandbox; merges.txt and held_out.jsonl are text, a tokenizer's and the zoo's.
SAFE_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", HELD_OUT_FILE, *LICENCES]
TORCH_FILES = ["*.bin", "*.pt", "*.pth"]  # read as tensors only


def local_folder(path: PathLike, *, verify: bool = True) -> Path:
    """The local folder for ``path``: a folder, GGUF file, ``zoo:NAME``, or a name on the hub.

    A name on the hub is ``owner/name``, or ``owner/name@revision``: a branch, a tag or a commit.
    A GGUF file's folder is temporary and holds everything but the weights, which stay in the file.
    A path that exists locally, or whose first folder does, is never looked up on the hub. With
    ``verify``, a run folder's damaged checkpoints are left out.

    Raises:
        ValueError: There is neither such a folder nor such a model, or the hub is not reachable.
    """
    name = os.fspath(path)
    if name.startswith(ZOO) and not Path(name).exists():
        return zoo_folder(name)
    if Path(name).suffix == SUFFIX and not Path(name).is_dir():
        return open_gguf(path)
    on_hub = HUB_NAME.fullmatch(name)
    if on_hub is None or Path(name).exists() or Path(name).parent.exists():
        return checkpoint_folder(path, verify=verify)
    from huggingface_hub import snapshot_download

    def fetched(files: list[str]) -> Path:
        repository, revision = on_hub.groups()
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))

    try:
        folder = fetched(SAFE_FILES)
        if not any(folder.glob("*.safetensors")):
            folder = fetched(SAFE_FILES + TORCH_FILES)
    except Exception as error:  # network, hub and access errors have no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} is no folder here, and could not be fetched from the Hugging Face hub "
            f"({reason}); give a folder, or go online and check the name"
        ) from None
    return checkpoint_folder(folder)


def zoo_names() -> list[str]:
    """The models that ship with the package, as ``local_folder`` takes them."""
    return sorted(ZOO + path.parent.name for path in ZOO_FOLDER.glob(f"*/{CONFIG_FILE}"))


def zoo_folder(name: str) -> Path:
    """The folder of a model that ships.

    Raises:
        ValueError: No such model ships; the message lists those that do.
    """
    if name not in zoo_names():
        raise ValueError(f"no model {name!r} ships; these do: {', '.join(zoo_names())}")
    return ZOO_FOLDER / name.removeprefix(ZOO)
