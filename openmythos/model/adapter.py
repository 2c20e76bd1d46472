"""Low-rank changes of a model's matrices: what stands in a layer where its weight was.

``AdaptedWeight`` takes the place of the matrix, as ``layer.weight``, and ``linear`` hands its call
to it: the model's code is the same, and all loops share the change. Where each loop has its own,
``AdaptedLayer`` takes the place of the layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from openmythos.model.loop_signal import LoopLinear


class LowRank(nn.Module):
    """A change of some rows of a matrix: ``scale * up down`` from row ``start`` on.

    With a first dimension more, each loop has its own, and later loops use the last one.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
    """

    def __init__(
        self, down: Float[Tensor, "*L R I"], up: Float[Tensor, "*L O R"], start: int, scale: float
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.start, self.scale = start, scale

    @property
    def stop(self) -> int:
        """The first row after those that change."""
        return self.start + self.up.shape[-2]

    @property
    def per_loop(self) -> bool:
        """Whether each loop has its own."""
        return self.up.ndim == 3

    def added(
        self, y: Float[Tensor, "*B O"], x: Float[Tensor, "*B I"], loop_idx: Any = None
    ) -> Float[Tensor, "*B O"]:
        """The product y of the whole matrix with x, and the change of these rows."""
        down, up = self.down, self.up
        if loop_idx is not None:
            row = loop_idx.clamp(max=len(down) - 1)
            change = torch.bmm(torch.bmm(x, down[row].transpose(1, 2)), up[row].transpose(1, 2))
        else:
            change = functional.linear(functional.linear(x, down), up)
        around = (self.start, y.shape[-1] - self.stop)
        return y + functional.pad(change * self.scale, around).to(y.dtype)


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
            y = change.added(y, x)
        return y


class AdaptedLayer(nn.Module):
    """A frozen layer of the core, and changes of its rows that are trained, one per loop."""

    def __init__(self, layer: LoopLinear, changes: Sequence[LowRank]) -> None:
        super().__init__()
        self.layer = layer
        self.changes = cast(Sequence[LowRank], nn.ModuleList(changes))

    def forward(
        self, x: Float[Tensor, "B T I"], loop_idx: Int[Tensor, "B"]
    ) -> Float[Tensor, "B T O"]:
        """Apply to each row the weights of its loop."""
        y: Tensor = self.layer(x, loop_idx)
        for change in self.changes:
            y = change.added(y, x, loop_idx)
        return y


def adapt(model: nn.Module, changes: Mapping[str, Sequence[LowRank]]) -> None:
    """Freeze a model, and add trainable changes to the matrices of these names."""
    model.requires_grad_(False)
    for name, each in changes.items():
        owner, _, leaf = name.rpartition(".")
        if each[0].per_loop:
            layer = cast(LoopLinear, model.get_submodule(owner))
            model.set_submodule(owner, AdaptedLayer(layer, each))
            continue
        module = model.get_submodule(owner)
        adapted = AdaptedWeight(getattr(module, leaf), each)
        delattr(module, leaf)
        setattr(module, leaf, adapted)


def changes_of(model: nn.Module) -> dict[str, list[LowRank]]:
    """The changes by the names of their matrices, those of ``adapt``."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedWeight):
            found[name] = [*module.changes]
        elif isinstance(module, AdaptedLayer):
            found[f"{name}.weight"] = [*module.changes]
    return found


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, by the names that it had before there were any."""
    tensors: dict[str, Tensor] = {**model.state_dict()}
    for place, module in model.named_modules():
        if not isinstance(module, AdaptedWeight | AdaptedLayer):
            continue
        for name in [name for name in tensors if name.startswith(f"{place}.")]:
            tensor, rest = tensors.pop(name), name.removeprefix(f"{place}.")
            if rest == "frozen":
                tensors[place] = tensor
            elif rest.startswith("layer."):
                tensors[f"{place}.{rest.removeprefix('layer.')}"] = tensor
    return tensors
