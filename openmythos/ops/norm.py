"""Root-mean-square normalisation: torch's operator, and on CPUs its gradient written out.

Torch has no fused kernel for CPUs; autograd would store and read twice as many tensors.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from openmythos.ops.cpu import build as native
from openmythos.ops.double_backward import differentiable_gradients


def rms_norm(
    x: Float[Tensor, "... C"], eps: float, weight: Float[Tensor, "C"] | None = None
) -> Float[Tensor, "... C"]:
    """``weight * x / rms(x)`` over the last dimension, computed in at least fp32.

    In half precision, the quotient is cast back to x's dtype before it is multiplied by the weight.
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
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y = x.square()
        scale = y.mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x, scale, out=y)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With n = x / rms(x) and g = grad * weight: (g - n mean(g n)) / rms(x).
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph, for second derivatives
            norm = lambda x, w: functional.rms_norm(x, x.shape[-1:], w, ctx.eps)  # noqa: E731
            return (*differentiable_gradients(ctx, norm, (x, weight), grad), None)
        unit = x * scale
        products, grad_weight = grad * unit, None
        if weight is not None:
            grad_weight = products.flatten(0, -2).sum(dim=0)
            products *= weight
        mean = products.mean(dim=-1, keepdim=True)
        through = grad.clone() if weight is None else torch.mul(grad, weight, out=products)
        return through.addcmul_(unit, mean, value=-1).mul_(scale), grad_weight, None
