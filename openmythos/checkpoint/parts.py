"""Tensors that lie in parts on several ranks: what each rank writes of them and reads again.

Every rank writes one safetensors file of its parts. Where a part begins in its tensor stands in the
file's metadata, in the words of ``torch.distributed.checkpoint``: its ``HuggingFaceStorageReader``
reads these files, too. They are written here because its own way sends and unpickles plans between
the ranks, and knows nothing of manifests.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PLACES_KEY, START_KEY, VERSION = "DCP_SHARDING_INFO", "saved_offsets", {"DCP_VERSION": "1.0"}


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins, and its size."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part as an index of the whole."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    @property
    def count(self) -> int:
        """Number of its elements."""
        return math.prod(self.size)

    def overlap(self, other: "Box") -> "Box":
        """What lies in both; its count is 0 if nothing does."""
        start = tuple(map(max, self.start, other.start))
        ends = zip(self.start, self.size, other.start, other.size, strict=True)
        end = [min(a + n, b + m) for a, n, b, m in ends]
        return Box(start, tuple(max(0, e - s) for s, e in zip(start, end, strict=True)))

    def seen_from(self, start: tuple[int, ...]) -> "Box":
        """The same part of a box that begins at ``start``."""
        return Box(tuple(a - b for a, b in zip(self.start, start, strict=True)), self.size)


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def own_box(tensor: Tensor) -> Box:
    """The part of a tensor that this process holds."""
    if not is_laid_out(tensor):
        return whole(tuple(tensor.shape))
    # Imported here: a process alone has no use for it, and it takes a second.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Box(tuple(start), tuple(size))


def own_values(tensor: Tensor) -> Tensor:
    """The values of ``own_box``; writing to them writes to the tensor."""
    return tensor.to_local() if is_laid_out(tensor) else tensor


def whole_values(tensor: Tensor) -> Tensor:
    """All values of a tensor; where it lies in parts, its ranks call it together."""
    return tensor.full_tensor() if is_laid_out(tensor) else tensor


def laid_out_like(tensor: Tensor, values: Tensor) -> Tensor:
    """A tensor with the layout of another, of which this process holds these values."""
    if not is_laid_out(tensor):
        return values
    return type(tensor).from_local(
        values,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@dataclass(frozen=True)
class OwnParts:
    """The values and the places of what this process writes of some tensors."""

    values: Mapping[str, Tensor]
    boxes: Mapping[str, Box]

    def copy(self) -> "OwnParts":
        """The same with values of its own, on the host."""
        copies = {n: v.detach().to("cpu", copy=True) for n, v in self.values.items()}
        return OwnParts(copies, self.boxes)


def own_parts(tensors: Mapping[str, Tensor]) -> OwnParts:
    """What this process writes of tensors; of those with the same part, the first one does."""
    mine = {name: tensor for name, tensor in tensors.items() if _writes(tensor)}
    boxes = {name: own_box(tensor) for name, tensor in mine.items()}
    boxes = {name: box for name, box in boxes.items() if box.count}
    return OwnParts({name: own_values(mine[name]) for name in boxes}, boxes)


def is_laid_out(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, whose module takes a second to load and may never be."""
    return hasattr(tensor, "placements")


def _writes(tensor: Tensor) -> bool:
    """Whether this process is the first of those that hold the same part."""
    if not is_laid_out(tensor):
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    mesh = tensor.device_mesh
    # The tensor's mesh may be one of several, along axes that it does not know: the first of these
    # has the first rank.
    where = zip(mesh.get_coordinate() or (), tensor.placements, strict=True)
    return int(mesh.mesh.min()) == 0 and not any(at for at, how in where if how.is_replicate())


# --- files ----------------------------------------------------------------------------------------


def rank_file(stem: str, rank: int, world: int) -> str:
    """The name of the file that a rank writes its parts into."""
    return f"{stem}-rank-{rank:05}-of-{world:05}.safetensors"


def rank_files(folder: Path, stem: str) -> list[Path]:
    """The files of all ranks; none if the tensors are not in parts.

    Raises:
        ValueError: Some are missing.
    """
    found = sorted(folder.glob(f"{stem}-rank-?????-of-?????.safetensors"))
    if not found:
        return []
    world = int(re.sub(r".*-of-(\d+)\.safetensors", r"\1", found[-1].name))
    names = [rank_file(stem, rank, world) for rank in range(world)]
    if [path.name for path in found] != names:
        raise ValueError(
            f"{folder} has {len(found)} of the {world} files {names[0]} to {names[-1]}"
        )
    return found


def places_metadata(boxes: Mapping[str, Box]) -> dict[str, str]:
    """The metadata of a file with these parts."""
    places = {name: {START_KEY: list(box.start)} for name, box in boxes.items()}
    return {**VERSION, PLACES_KEY: json.dumps(places)}


def stored_starts(metadata: Mapping[str, str] | None) -> dict[str, tuple[int, ...]]:
    """Where each part of a file begins, by its name; nothing for a file of whole tensors.

    Raises:
        ValueError: The metadata is not such.
    """
    try:
        places = json.loads((metadata or {}).get(PLACES_KEY, "{}"))
        return {name: tuple(map(int, place[START_KEY])) for name, place in places.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("where its parts belong cannot be read") from None
