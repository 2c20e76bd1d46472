"""Low-rank changes of a model's matrices: what stands in a layer where its weight was.

``AdaptedWeight`` takes the place of the matrix, as ``layer.weight``, and ``linear`` hands its call
to it. The model's code is the same, and all loops share the change.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class LowRank(nn.Module):
    """A change of some rows of a matrix: ``scale * up down`` from row ``start`` on.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
    """

    def __init__(
        self, down: Float[Tensor, "R I"], up: Float[Tensor, "O R"], start: int, scale: float
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.start, self.scale = start, scale

    @property
    def stop(self) -> int:
        """The first row after those that change."""
        return self.start + len(self.up)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """What the change adds to these rows of the product."""
        return functional.linear(functional.linear(x, self.down), self.up) * self.scale


class AdaptedWeight(nn.Module):
    """A frozen matrix, and changes of its rows that are trained."""

    def __init__(self, weight: Float[Tensor, "O I"], changes: Sequence[LowRank]) -> None:
        super().__init__()
        self.frozen = nn.Parameter(weight.detach(), requires_grad=False)
        self.changes = cast(Sequence[LowRank], nn.ModuleList(changes))

    @torch.no_grad()
    def merged(self) -> Float[Tensor, "O I"]:
        """The matrix with its changes, added up in at least fp32."""
        wide = torch.promote_types(self.frozen.dtype, torch.float32)
        whole = self.frozen.to(wide, copy=True)
        for change in self.changes:
            product = change.up.to(whole) @ change.down.to(whole)
            whole[change.start : change.stop] += product * change.scale
        return whole.to(self.frozen.dtype)

    def view(self, *shape: int) -> Float[Tensor, "..."]:
        """The merged matrix in another shape, where a layer multiplies by parts of it."""
        return self.merged().view(*shape)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Tensor:
        if func is not functional.linear:
            raise TypeError(f"{getattr(func, '__name__', func)} does not take adapted weights")
        x, weight, *others = args
        y = functional.linear(x, weight.frozen, *others, **(kwargs or {}))
        for change in weight.changes:
            around = (change.start, y.shape[-1] - change.stop)
            y = y + functional.pad(change(x), around).to(y.dtype)
        return y


def adapt(model: nn.Module, changes: Mapping[str, Sequence[LowRank]]) -> None:
    """Freeze a model, and add trainable changes to the matrices of these names."""
    model.requires_grad_(False)
    for name, each in changes.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        adapted = AdaptedWeight(getattr(module, leaf), each)
        delattr(module, leaf)
        setattr(module, leaf, adapted)


def merge(model: nn.Module) -> None:
    """Put the merged matrices where the adapted ones are; everything gets gradients again."""
    for name in adapted_weights(model):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        whole = getattr(module, leaf).merged()
        delattr(module, leaf)
        setattr(module, leaf, nn.Parameter(whole))
    model.requires_grad_(True)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, by the names that it had before there were any."""
    tensors, frozen = (
        model.state_dict(),
        {f"{name}.frozen": name for name in adapted_weights(model)},
    )
    changes = tuple(f"{name}.changes." for name in frozen.values())
    kept = (name for name in tensors if not (changes and name.startswith(changes)))
    return {frozen.get(name, name): tensors[name] for name in kept}


def adapted_weights(model: nn.Module) -> dict[str, AdaptedWeight]:
    """The adapted matrices by their names, those of ``adapt``."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdaptedWeight)
    }
