"""SwiGLU's elementwise part: torch's operators, and on CPUs a fused forward and backward."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from openmythos.ops.cpu import build as native
from openmythos.ops.double_backward import differentiable_gradients


def swiglu_reference(inner: Float[Tensor, "... _"]) -> Float[Tensor, "... F"]:
    """``SiLU(gate) * up``, where gate and up are the two halves of ``inner``."""
    gate, up = inner.chunk(2, dim=-1)
    return functional.silu(gate) * up


def swiglu(inner: Float[Tensor, "... _"]) -> Float[Tensor, "... F"]:
    """As the reference, fused on CPUs."""
    if _takes(inner):
        hidden: Tensor = _SwiGLU.apply(inner)
        return hidden
    return swiglu_reference(inner)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        return swiglu_forward(inner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        (inner,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph, for second derivatives
            return differentiable_gradients(ctx, swiglu_reference, (inner,), grad)[0]
        return swiglu_backward(grad, inner)[0]


def swiglu_forward(
    inner: Float[Tensor, "... _"],
    share: Float[Tensor, "N K"] | None = None,
    order: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, "... F"]:
    """``SiLU(gate) * up``, where gate and up are the two halves of ``inner``.

    With ``share``, the weights of the tokens' experts, row m of the result ``[M F]`` is also
    multiplied by entry ``order[m]`` of it, counted as if flattened.
    """
    if _takes(inner, share):
        kernel = torch.ops.openmythos_fused.swiglu
        hidden: Tensor = kernel(inner.contiguous(), native.packed(share), order)
        return hidden
    gate, up = inner.chunk(2, dim=-1)
    hidden = functional.silu(gate).mul_(up)
    return hidden if share is None else hidden.mul_(share.flatten()[order, None])


def swiglu_backward(
    grad: Float[Tensor, "... F"],
    inner: Float[Tensor, "... _"],
    share: Float[Tensor, "N K"] | None = None,
    order: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "... _"], Float[Tensor, "N K"] | None]:
    """The gradients of ``inner`` and of ``share``."""
    if _takes(inner, share) and native.takes("fused", grad):
        kernel = torch.ops.openmythos_fused.swiglu_backward
        packed = grad.contiguous(), inner.contiguous(), native.packed(share)
        grad_inner, grad_share = kernel(*packed, order)
        return grad_inner, None if share is None else grad_share
    gate, up = inner.chunk(2, dim=-1)
    active, grad_inner, grad_share = functional.silu(gate), torch.empty_like(inner), None
    if share is not None:
        grad_share = share.new_empty(share.shape)
        grad_share.view(-1)[order] = (grad * active).mul_(up).sum(dim=-1)
        grad = grad * share.flatten()[order, None]
    grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
    torch.mul(grad, active, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grad_inner, grad_share


def _takes(inner: Tensor, share: Tensor | None = None) -> bool:
    return native.whole(inner) and native.takes("fused", inner, share)
