"""The weights of a checkpoint folder of any model family: names, shapes, and single tensors.

No code in a file is run, NaN and infinite weights are refused, and tensors that were read do not
stay in memory.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from openmythos.checkpoint.parts import Box, rank_files, stored_starts, whole
from openmythos.config.schema import in_words
from openmythos.folder import in_a_sentence, listed

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_STEM = "model"  # of the files of ranks
PICKLE_FILES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth")
INDEX_FILES = (WEIGHTS_FILE + ".index.json", "pytorch_model.bin.index.json")
COMPILED = "_orig_mod."  # inside names, where a user compiled a part of a model
WRAPPERS = ("module.", COMPILED)  # name prefixes added by data parallelism and torch.compile
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What is read from a memory-mapped file stays in memory until the file is closed. Mapped files are
# therefore reopened each time that so many bytes were read.
REOPEN_BYTES = 1 << 23

Shapes = Mapping[str, tuple[int, ...]]


def stored_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of a folder's weights in memory, without reading them; None: in the stored dtype.

    Raises:
        ValueError: As ``StoredWeights``.
    """
    if dtype is not None:
        weights = StoredWeights(folder)
        return weights.size(weights.shapes) * dtype.itemsize
    index = _index_of(folder)
    files = _files_of(folder) if index is None else {*index.values()}
    return sum(path.stat().st_size for path in files)


@dataclass(frozen=True)
class _Place:
    """Where a part of a tensor, or all of it, is stored: its file, its name there, and its box."""

    path: Path
    stored: str
    box: Box


class StoredTensors:
    """The tensors of some files, whole or in the parts that ranks wrote; each is read by ``read``.

    Raises:
        ValueError: A file is damaged, or parts of a tensor are missing.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[_Place]] = {}
        self._open: dict[Path, _Tensors] = {}
        self._num_bytes = 0
        for path in files:
            file = _Tensors(path)
            for stored, shape in file.shapes.items():
                name = stored if stored.startswith(WRAPPERS) else stored.replace(COMPILED, "")
                is_part = stored in file.starts
                start = file.starts[stored] if is_part else (0,) * len(shape)
                place = _Place(path, stored, Box(start, shape))
                others = self._places.get(name, []) if is_part else []
                self._places[name] = [*others, place]
        for name, places in self._places.items():
            ends = ([a + n for a, n in zip(p.box.start, p.box.size, strict=True)] for p in places)
            self.shapes[name] = tuple(map(max, zip(*ends, strict=True)))
            if sum(place.box.count for place in places) != math.prod(self.shapes[name]):
                raise ValueError(f"{places[0].path.parent}: parts of {name} are missing")

    def strip(self, prefixes: tuple[str, ...]) -> None:
        """Remove those of the prefixes that all names begin with, in any order."""
        while found := [p for p in prefixes if self.shapes and all(map(_starts(p), self.shapes))]:
            size = len(found[0])
            self.shapes = {name[size:]: shape for name, shape in self.shapes.items()}
            self._places = {name[size:]: places for name, places in self._places.items()}

    def size(self, names: Iterable[str]) -> int:
        """Number of elements of these tensors; read large ones first: they need most memory."""
        return sum(math.prod(self.shapes[name]) for name in names)

    def read(self, name: str) -> Tensor:
        """One tensor, possibly as a view of its file; copy it to keep it.

        Raises:
            ValueError: It is refused.
        """
        return self.read_part(name, whole(self.shapes[name]))

    def read_part(self, name: str, wanted: Box) -> Tensor:
        """A part of a tensor, of which no more is read; as ``read``."""
        places = self._places[name]
        if len(places) == 1 and wanted == places[0].box:
            return self._read(name, places[0], wanted)
        made = None
        for place in places:
            both = place.box.overlap(wanted)
            if both.count:
                part = self._read(name, place, both)
                made = part.new_empty(wanted.size) if made is None else made
                made[both.seen_from(wanted.start).slices] = part
        return torch.empty(wanted.size) if made is None else made

    def _read(self, name: str, place: _Place, box: Box) -> Tensor:
        """What lies in a box of the tensor, which the place has."""
        if self._num_bytes > REOPEN_BYTES:
            self._open = {p: file for p, file in self._open.items() if not file.mapped}
            self._num_bytes = 0
        if place.path not in self._open:
            self._open[place.path] = _Tensors(place.path)
        file = self._open[place.path]
        inside = None if box == place.box else box.seen_from(place.box.start)
        tensor = file.read(place.stored, inside)
        self._num_bytes += tensor.nbytes if file.mapped else 0
        return tensor


class StoredWeights(StoredTensors):
    """A folder's weights: names and shapes are read at once, each tensor only by ``read``.

    Reads model.safetensors, pickles that hold only tensors, shards of either with an index, and the
    files of all ranks of a run.

    Raises:
        ValueError: No weights, a damaged file, or a pickle that holds code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _index_of(folder)
        super().__init__(_files_of(folder) if index is None else sorted({*index.values()}))
        places = {(place.path, place.stored) for each in self._places.values() for place in each}
        lost = [name for name, path in (index or {}).items() if (path, name) not in places]
        if lost:
            raise ValueError(f"{folder}: the shards lack what the index promises: {listed(lost)}")
        self.strip(WRAPPERS)

    def _read(self, name: str, place: _Place, box: Box) -> Tensor:
        """As of ``StoredTensors``; a weight is of a floating dtype, and finite."""
        tensor = super()._read(name, place, box)
        if tensor.dtype not in DTYPES:
            allowed = "float16, bfloat16, float32 or float64"
            raise ValueError(f"{place.path}: {name} has dtype {tensor.dtype}; it must be {allowed}")
        if tensor.numel() and not all(bool(limit.isfinite()) for limit in tensor.aminmax()):
            raise ValueError(f"{place.path}: {name} holds NaN or infinite weights")
        return tensor


class _Tensors:
    """One file, memory-mapped while this object exists; a pickle that is no zip is read at once."""

    def __init__(self, path: Path) -> None:
        self.mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
        self.starts: dict[str, tuple[int, ...]] = {}  # of parts of tensors
        self._dict: dict[str, Tensor] | None = None
        if path.suffix != ".safetensors":
            self._dict = _load_pickle(path)
            self.shapes = tensor_shapes(self._dict)
            return
        try:
            self._handle: Any = safetensors.safe_open(path, framework="pt", device="cpu")
            self.starts = stored_starts(self._handle.metadata())
            self.shapes = {
                name: tuple(self._handle.get_slice(name).get_shape())
                for name in self._handle.keys()  # noqa: SIM118 (not a dict)
            }
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is truncated or damaged: {in_a_sentence(error)}") from None

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor; with a box, that part of it."""
        if self._dict is not None:
            return self._dict[name] if box is None else self._dict[name][box.slices]
        if box is None:
            return self._handle.get_tensor(name)
        return self._handle.get_slice(name)[box.slices]


def _index_of(folder: Path) -> dict[str, Path] | None:
    """The file of each tensor according to the folder's index; None if the weights are one file."""
    if (folder / WEIGHTS_FILE).is_file():
        return None
    for path in (folder / name for name in INDEX_FILES):
        if path.is_file():
            places = read_json(path).get("weight_map")
            if not isinstance(places, dict) or not all(map(_is_file_name, places.values())):
                raise ValueError(f"{path} has no weight_map of file names in its own folder")
            shards = {name: folder / place for name, place in places.items()}
            if absent := sorted({shard.name for shard in shards.values() if not shard.is_file()}):
                raise ValueError(f"{path} names shards that are missing: {listed(absent)}")
            return shards
    return None


def _is_file_name(place: object) -> bool:
    return isinstance(place, str) and place not in ("", "..") and Path(place).name == place


def _files_of(folder: Path) -> list[Path]:
    for path in (folder / name for name in (WEIGHTS_FILE, *PICKLE_FILES)):
        if path.is_file():
            return [path]
    if files := rank_files(folder, WEIGHTS_STEM):
        return files
    raise ValueError(f"{folder} has no weights; expected {WEIGHTS_FILE}")


def _starts(prefix: str) -> Any:
    return lambda name: name.startswith(prefix) and name != prefix


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, read without running code; of a training state, the model's."""
    try:
        data = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged or holds code besides tensors, and was not loaded because that "
            "could run the code; convert it to safetensors with the program that wrote it"
        ) from None
    except Exception as error:  # a damaged pickle can raise any of them
        reason = "".join(str(error).splitlines()[:1])
        raise ValueError(f"{path} is truncated or damaged: {reason}") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(wrapper), dict):
            data = data[wrapper]
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    return {str(name): tensor for name, tensor in data.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, as a dict.

    Raises:
        ValueError: The file is not JSON, or holds something other than an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {in_words(data)}, not an object")
    return data


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(given: Shapes, expected: Shapes, where: Path) -> None:
    """Check that the given names and shapes are the expected ones.

    Raises:
        ValueError: They differ; the message lists names that are missing, unexpected or misshapen.
    """
    complaints = []
    if missing := sorted(set(expected) - set(given)):
        complaints.append(f"missing: {listed(missing)}")
    if unexpected := sorted(set(given) - set(expected)):
        complaints.append(f"unexpected: {listed(unexpected)}")
    wrong = [
        f"{name} is {list(given[name])}, expected {list(expected[name])}"
        for name in sorted(set(given) & set(expected))
        if tuple(given[name]) != tuple(expected[name])
    ]
    if wrong:
        complaints.append(f"wrong shape: {listed(wrong)}")
    if complaints:
        raise ValueError(
            f"the weights in {where} do not fit its {CONFIG_FILE}: {'; '.join(complaints)}"
        )
