"""Which part of a parameter each rank holds.

FSDP shards what tensor or expert parallelism has left on a rank, so that of a mesh's axes the last
divides first. The parts are those of ``torch.chunk``: the last ones may be smaller, or empty.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from openmythos.checkpoint.parts import is_laid_out

if TYPE_CHECKING:  # on one process nothing is a DTensor, whose module takes a second to load
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


def divisions(parameter: "DTensor") -> Iterator[Division]:
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


def own_indices(
    parameter: "DTensor", order: tuple[int, Int[Tensor, "R"]] | None = None
) -> list[Int[Tensor, "_"]]:
    """Of each dimension of a parameter, the indices that this rank's part has.

    Args:
        parameter: The parameter.
        order: Of a fused matrix, the result of ``fused_orders``.
    """
    indices = [torch.arange(size) for size in parameter.shape]
    if order is not None:
        indices[order[0]] = order[1]
    for each in divisions(parameter):
        indices[each.dim] = indices[each.dim].split(list(each.sizes))[each.rank]
    return indices


def rearranged(tensor: "DTensor", dim: int, index: Int[Tensor, "R"]) -> "DTensor":
    """``tensor.index_select(dim, index)``, laid out as the tensor is; all its ranks call it."""
    part = tensor.full_tensor().index_select(dim, index.to(tensor.device))
    for number, own in enumerate(own_indices(tensor)):
        part = part.index_select(number, own.to(part.device))
    return type(tensor).from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


# --- fused matrices, whose parts are divided one by one -------------------------------------------


def fused_orders(model: nn.Module) -> dict[str, tuple[int, Int[Tensor, "R"]]]:
    """The fused parameters by name: the dimension along which they are divided, and its order.

    Index n of such a DTensor is index ``order[n]`` of the parameter on one process.
    """
    return {
        f"{prefix}.{name}": order
        for prefix, module in model.named_modules()
        for name, order in getattr(module, "orders", {}).items()
    }


@torch.no_grad()
def in_plain_order(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, those of fused parameters in the order of one process.

    Args:
        model: The model.
        tensors: By the names of parameters, or these with a word more: ``NAME.momentum``.
    """
    orders, result = fused_orders(model), dict(tensors)
    for name, value in tensors.items():
        order = orders.get(name) or orders.get(name.rpartition(".")[0])
        if order is not None and is_laid_out(value):
            result[name] = rearranged(value, order[0], order[1].argsort())
    return result


@torch.no_grad()
def put_in_fused_order(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of ``in_plain_order``, in the tensors' own memory."""
    orders = fused_orders(model)
    for name, value in tensors.items():
        order = orders.get(name) or orders.get(name.rpartition(".")[0])
        if order is not None and is_laid_out(value):
            value.to_local().copy_(rearranged(value, *order).to_local())


Part = tuple[Shaped[Tensor, "R C"], Int[Tensor, "R"], Any]  # values, rows, an index of columns


def own_parts(model: nn.Module) -> Callable[[str, Tensor], Part]:
    """Of a parameter by its name, this rank's part as a matrix, and which part of the whole it is.

    The whole counts as a matrix: its last dimension by all others. Writing to the part writes to
    the parameter.
    """
    orders = fused_orders(model)

    def own_part(name: str, parameter: Tensor) -> Part:
        others = parameter.shape[:-1]
        rows = torch.arange(others.numel()).view(others)
        if not is_laid_out(parameter):
            return parameter.view(-1, parameter.shape[-1]), rows.flatten(), slice(None)
        indices = own_indices(parameter, orders.get(name))
        for axis, index in enumerate(indices[:-1]):
            rows = rows.index_select(axis, index)
        return (
            parameter.to_local().view(rows.numel(), len(indices[-1])),
            rows.flatten(),
            indices[-1],
        )

    return own_part
