"""Which part of a parameter each rank holds.

FSDP shards what tensor or expert parallelism has left on a rank, so that of a mesh's axes the last
divides first. The parts are those of ``torch.chunk``: the last ones may be smaller, or empty.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Division:
    """One division of a parameter: along ``dim``, over the ranks of an axis of its mesh.

    Attributes:
        axis: The axis, by its number.
        dim: The dimension of the parameter.
        sizes: The sizes of the ranks' parts.
        rank: This rank's place on the axis.
    """

    axis: int
    dim: int
    sizes: tuple[int, ...]
    rank: int


def divisions(parameter: DTensor) -> Iterator[Division]:
    """How a parameter is divided, in order: each divides what those before it left on this rank."""
    mesh, place = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert place is not None
    left = list(parameter.shape)
    for axis in reversed(range(mesh.ndim)):
        placement, num_ranks = parameter.placements[axis], mesh.size(axis)
        if placement.is_replicate() or num_ranks == 1:
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]
        chunks = [len(part) for part in torch.arange(left[dim]).chunk(num_ranks)]
        sizes = (*chunks, *[0] * (num_ranks - len(chunks)))
        left[dim] = sizes[place[axis]]
        yield Division(axis, dim, sizes, place[axis])


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; of another tensor, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_indices(
    parameter: DTensor, order: tuple[int, Int[Tensor, "R"]] | None = None
) -> list[Int[Tensor, "_"]]:
    """Of each dimension of a parameter, the indices that this rank's part has.

    Args:
        parameter: The parameter.
        order: Of a fused matrix, the result of ``tensor.fused_orders``.
    """
    indices = [torch.arange(size) for size in parameter.shape]
    if order is not None:
        indices[order[0]] = order[1]
    for each in divisions(parameter):
        indices[each.dim] = indices[each.dim].split(list(each.sizes))[each.rank]
    return indices


def rearranged(tensor: DTensor, dim: int, index: Int[Tensor, "R"]) -> DTensor:
    """``tensor.index_select(dim, index)``, laid out as the tensor is; all its ranks call it."""
    part = tensor.full_tensor().index_select(dim, index.to(tensor.device))
    for number, own in enumerate(own_indices(tensor)):
        part = part.index_select(number, own.to(part.device))
    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
