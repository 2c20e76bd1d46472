"""Gradients of a model that may lie in parts on several ranks: summed, measured and scaled.

Where FSDP2 has no units it is not imported: on one process.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmythos.checkpoint.parts import is_laid_out, own_values
from openmythos.train.ranks import AXES, JOINT_AXES, Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def is_unit(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether a module is a unit of FSDP2, which gathers and frees its weights."""
    return hasattr(module, "reshard")


def units(model: nn.Module) -> Iterator["FSDPModule"]:
    """The units of FSDP2; none on one process alone."""
    return (module for module in model.modules() if is_unit(module))


def reshard(model: nn.Module) -> None:
    """Free the gathered weights; until then gradients and optimisers miss the kept units."""
    for module in units(model):
        module.reshard()


def hold_gradients(model: nn.Module) -> None:
    """Let the next backward passes keep their whole gradients, without summing them over ranks."""
    if is_unit(model):
        model.set_requires_gradient_sync(False)


def release_gradients(model: nn.Module) -> None:
    """Sum what was held over the ranks, once.

    Not in the last backward pass itself: a block that loops ends a pass in every loop, and would
    first sum what the passes before have left, and then the rest.
    """
    for module in units(model):
        module.set_requires_gradient_sync(True, recurse=False)
        # Not public in torch 2.13: what the engine calls at the end of a backward pass.
        for group in module._get_fsdp_state()._fsdp_param_groups:
            group.post_backward()
            group.finalize_backward()


def local_gradients(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Every gradient with this rank's part of it."""
    for parameter in model.parameters():
        grad = parameter.grad
        if grad is not None:
            yield grad, own_values(grad)


@torch.no_grad()
def square_sum(model: nn.Module, ranks: Ranks) -> Float[Tensor, ""]:
    """This rank's share of the sum of all squared gradients: over all ranks, each counts once."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for grad, part in local_gradients(model):
        if _counts(grad, ranks):
            total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
    return total


def _counts(grad: Tensor, ranks: Ranks) -> bool:
    """Whether this rank is the first of those that hold the same part of a gradient."""
    assert ranks.mesh is not None
    split: set[str] = set()
    if is_laid_out(grad):
        for name, placement in zip(
            grad.device_mesh.mesh_dim_names or (), grad.placements, strict=True
        ):
            if not placement.is_replicate():
                split.update(JOINT_AXES.get(name, (name,)))
    coordinate = ranks.mesh.get_coordinate() or ()  # slicing a mesh by axis takes far longer
    return not any(at for axis, at in zip(AXES, coordinate, strict=True) if axis not in split)


@torch.no_grad()
def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply all gradients, each rank its own part."""
    for _, part in local_gradients(model):
        part.mul_(factor)
