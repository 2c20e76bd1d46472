"""Checkpoint folders: model.safetensors, config.json and, optionally, tokenizer.json.

Writing replaces a whole folder at once. Reading checks every name and shape before it reads a
weight, and every weight before it returns a model. The folders of other families are the matter of
``interop``, which uses ``StoredWeights``, ``check_shapes`` and ``fill_model`` from here.
"""

import contextlib
import ctypes
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from openmythos.config import ModelConfig
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.schema import from_dict, to_dict
from openmythos.tokenizer import Tokenizer

FORMAT, FORMAT_VERSION = "openmythos", 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
PICKLE_FILES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth")
OWN_FILES = {CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json"}
REOPEN_BYTES = 1 << 26  # an open safetensors file keeps all that was read of it in memory
MAX_LISTED = 30  # names that one error message lists of a kind

PathLike = str | os.PathLike[str]
Shapes = Mapping[str, tuple[int, ...]]


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


@contextlib.contextmanager
def replaced_folder(folder: PathLike) -> Iterator[Path]:
    """An empty folder to write into; when the block ends well it takes the place of ``folder``.

    Until then ``folder`` is untouched. What a killed writer leaves beside it, ``.NAME.tmp``, is
    removed by the next one; two processes must not write the same folder at once.

    Raises:
        ValueError: ``folder`` holds files that no checkpoint has.
    """
    target = Path(os.path.realpath(folder))
    _refuse_foreign(target)
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


def _refuse_foreign(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a checkpoint is a folder")
    if target.is_dir():
        foreign = sorted(path.name for path in target.iterdir() if path.name not in OWN_FILES)
        if foreign:
            names = _listed(foreign)
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
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}, not a JSON object")
    return data


class StoredWeights:
    """A folder's weights: names and shapes at once, each tensor when it is asked for.

    Reads model.safetensors, its sharded form with an index, or a pickle that holds tensors only.

    Raises:
        ValueError: No weights, a damaged file, or a pickle that holds code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, Path | Tensor] = {}  # a safetensors file, or the tensor itself
        self._file: Any = None
        self._opened: Path | None = None
        self._num_bytes = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        pickles = [folder / name for name in PICKLE_FILES if (folder / name).is_file()]
        if (folder / WEIGHTS_FILE).is_file():
            self._open(folder / WEIGHTS_FILE)
        elif (folder / INDEX_FILE).is_file():
            self._open_shards(_read_json(folder / INDEX_FILE))
        elif pickles:
            tensors = _load_pickle(pickles[0])
            self._places.update(tensors)
            self.shapes = tensor_shapes(tensors)
        else:
            raise ValueError(f"{folder} has no weights; expected {WEIGHTS_FILE}")

    def read(self, name: str) -> Tensor:
        """One tensor; a view of its file, to be copied before it is kept."""
        place = self._places[name]
        if isinstance(place, Tensor):
            return place
        if place != self._opened or self._num_bytes > REOPEN_BYTES:
            self._file = safetensors.safe_open(place, framework="pt", device="cpu")
            self._opened, self._num_bytes = place, 0
        tensor = self._file.get_tensor(name)
        self._num_bytes += tensor.nbytes
        return tensor

    def _open(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._places[name] = path
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None

    def _open_shards(self, index: Mapping[str, Any]) -> None:
        places = index.get("weight_map")
        if not isinstance(places, dict) or any(Path(p).name != p for p in places.values()):
            raise ValueError(f"{self.folder / INDEX_FILE} has no weight_map of file names")
        for shard in sorted(set(places.values())):
            self._open(self.folder / shard)
        lost = sorted(set(places) - set(self.shapes))
        if lost:
            raise ValueError(f"{self.folder}: no shard holds {_listed(lost)}")


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, read without running code; a training state's model is unwrapped."""
    try:
        data = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged or holds code besides tensors, and was not loaded because that "
            "could run the code; convert it to safetensors with the program that wrote it"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[:1]
        raise ValueError(f"{path} is truncated or damaged: {''.join(reason)}") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(wrapper), dict):
            data = data[wrapper]
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    for prefix in ("module.", "_orig_mod."):  # of data-parallel and compiled models
        data = {name.removeprefix(prefix): tensor for name, tensor in data.items()}
    return data


def empty_model(config: ModelConfig) -> RecurrentDepthLM:
    """The model without memory for its weights; ``fill_model`` completes it."""
    with torch.device("meta"):
        return RecurrentDepthLM(config)


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(given: Shapes, expected: Shapes, where: Path) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: Lists what is missing, unexpected or of the wrong shape.
    """
    complaints = []
    if missing := sorted(set(expected) - set(given)):
        complaints.append(f"missing: {_listed(missing)}")
    if unexpected := sorted(set(given) - set(expected)):
        complaints.append(f"unexpected: {_listed(unexpected)}")
    wrong = [
        f"{name} is {list(given[name])}, expected {list(expected[name])}"
        for name in sorted(set(given) & set(expected))
        if tuple(given[name]) != tuple(expected[name])
    ]
    if wrong:
        complaints.append(f"wrong shape: {_listed(wrong)}")
    if complaints:
        raise ValueError(
            f"the weights in {where} do not fit its {CONFIG_FILE}: {'; '.join(complaints)}"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


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
        ValueError: A weight that is not floating or not finite, or a dtype that is not floating.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating dtype")
    for name, tensor in tensors:
        _check_numbers(name, tensor, where)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(tensor.to(device, dtype).contiguous()))
        else:
            setattr(module, leaf, tensor.to(device))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:  # statistics, which start at zero
                setattr(module, name, torch.zeros_like(buffer, device=device))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    return model.eval()


def _check_numbers(name: str, tensor: Tensor, where: Path) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{where}: {name} has dtype {tensor.dtype}; it must be floating")
    if not all(bool(limit.isfinite()) for limit in tensor.aminmax()):
        raise ValueError(f"{where}: {name} holds NaN or infinite weights")


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
        _check_numbers(name, weights.read(name), folder)
    for name, tensor in ours.items():
        tensor.copy_(weights.read(name))


def load_checkpoint(
    path: PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RecurrentDepthLM:
    """Load a folder that ``save_pretrained`` wrote; ``interop`` loads the other families too.

    Raises:
        ValueError: Not such a folder, or one that is damaged, incomplete or does not fit.
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
    stored = ((name, weights.read(name).clone()) for name in weights.shapes)
    return fill_model(model, stored, folder, dtype, device)
