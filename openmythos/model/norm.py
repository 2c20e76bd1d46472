"""Root-mean-square normalisation."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from openmythos.ops.cpu import build as native


class RMSNorm(nn.Module):
    """``weight * x / rms(x)``; cast back to the input's dtype before the weight.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Normalise the last dimension."""
        return rms_norm(x, self.eps, self.weight)


def rms_norm(
    x: Float[Tensor, "... C"], eps: float, weight: Float[Tensor, "C"] | None = None
) -> Float[Tensor, "... C"]:
    """Scale the last dimension to unit mean square; statistics in at least fp32.

    A narrow x is cast back before the weight.
    """
    weight = None if weight is None else weight.to(x.dtype)
    if x.dtype not in (torch.float32, torch.float64):
        y = _wide_rms_norm(x.float(), None, eps).to(x.dtype)
        return y if weight is None else y * weight
    return _wide_rms_norm(x, weight, eps)


def _wide_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if native.eager() and x.device.type == "cpu":
        y: Tensor = _RMSNorm.apply(x, weight, eps)
        return y
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The gradient written out, for CPUs.

    Torch has no fused kernel there, and autograd would keep and pass twice as many tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, scale = native.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            norm = lambda x, w: functional.rms_norm(x, x.shape[-1:], w, ctx.eps)  # noqa: E731
            return (*native.gradients_again(ctx, norm, (x, weight), grad), None)
        return (*native.rms_norm_backward(grad, x, weight, scale), None)
