"""Whole matrices from their shards: each is gathered to one rank, its owner, and scattered back.

The optimiser Muon needs whole matrices. Were each gathered everywhere, every rank would do the work
of all; here the owners divide it, with two exchanges for all matrices of one shape.

Source: Liu et al. 2025, Muon is scalable for LLM training (arXiv 2502.16982), section 2.3, where
each matrix is gathered to one rank, too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from openmythos.checkpoint.parts import is_laid_out
from openmythos.train.shard import divisions


@dataclass(frozen=True)
class Axis:
    """Ranks that hold pieces of the same matrices, divided along ``dim`` of a stack of them."""

    group: dist.ProcessGroup
    dim: int  # 1: rows; 2: columns
    sizes: tuple[int, ...]  # of the ranks' pieces along it

    def gather(self, pieces: Float[Tensor, "M _ _"]) -> Float[Tensor, "N _ _"]:
        """Of a piece of every matrix, the matrices that this rank owns, whole along this axis."""
        num_ranks, rank = len(self.sizes), dist.get_rank(self.group)
        sent = [pieces[owner::num_ranks] for owner in range(num_ranks)]
        shapes = [list(sent[rank].shape) for _ in self.sizes]
        for shape, size in zip(shapes, self.sizes, strict=True):
            shape[self.dim] = size
        return torch.cat(self._exchange(sent, shapes), dim=self.dim)

    def scatter(
        self, whole: Float[Tensor, "N _ _"], like: Float[Tensor, "M _ _"]
    ) -> Float[Tensor, "M _ _"]:
        """Inverse of ``gather``: the pieces of every matrix, ordered and shaped as ``like``."""
        num_ranks, result = len(self.sizes), torch.empty_like(like)
        mine = [result[owner::num_ranks] for owner in range(num_ranks)]
        sent = whole.split(list(self.sizes), dim=self.dim)
        received = self._exchange(list(sent), [list(part.shape) for part in mine])
        for part, values in zip(mine, received, strict=True):
            part.copy_(values)
        return result

    def _exchange(self, sent: list[Tensor], shapes: list[list[int]]) -> list[Tensor]:
        """Send a tensor to each rank; return what each has sent, in these shapes."""
        counts = [torch.Size(shape).numel() for shape in shapes]
        received = sent[0].new_empty(sum(counts))
        flat, sizes = torch.cat([part.flatten() for part in sent]), [part.numel() for part in sent]
        dist.all_to_all_single(received, flat, counts, sizes, group=self.group)
        parts = zip(received.split(counts), shapes, strict=True)
        return [part.view(shape) for part, shape in parts]


def axes_of(parameter: Tensor) -> tuple[Axis, ...]:
    """The axes along which a parameter's matrices are divided; none where whole ones are local."""
    if not is_laid_out(parameter):
        return ()
    mesh, first = parameter.device_mesh, parameter.ndim - 2
    axes = [
        Axis(mesh.get_group(each.axis), each.dim - first + 1, each.sizes)
        for each in divisions(parameter)
        if each.dim >= first
    ]
    return tuple(reversed(axes))


def by_owner(
    function: Callable[[Tensor], Tensor], pieces: Float[Tensor, "M _ _"], axes: tuple[Axis, ...]
) -> Float[Tensor, "M _ _"]:
    """A function of whole matrices, from the pieces of their arguments to those of their results.

    Args:
        function: Of a stack of matrices; it is called on those that this rank owns.
        pieces: This rank's piece of every matrix.
        axes: The result of ``axes_of`` for them; all ranks of the axes call this together.
    """
    if not axes:
        return function(pieces) if len(pieces) else pieces
    axis, *others = axes
    return axis.scatter(by_owner(function, axis.gather(pieces), tuple(others)), pieces)
