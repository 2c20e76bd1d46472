"""SwiGLU's elementwise part, and its gradient written out for the experts."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def swiglu(inner: Float[Tensor, "... _"]) -> Float[Tensor, "... F"]:
    """``SiLU(gate) * up`` of the two halves of ``inner``."""
    gate, up = inner.chunk(2, dim=-1)
    return functional.silu(gate) * up


def swiglu_backward(
    grad: Float[Tensor, "M F"],
    inner: Float[Tensor, "M _"],
    share: Float[Tensor, "N K"],
    order: Int[Tensor, "M"],
) -> tuple[Float[Tensor, "M _"], Float[Tensor, "N K"]]:
    """The gradients of ``inner`` and of the shares for ``swiglu(inner) * share.flatten()[order]``.

    There row m is multiplied by entry ``order[m]`` of the shares.
    """
    gate, up = inner.chunk(2, dim=-1)
    active, grad_inner = functional.silu(gate), torch.empty_like(inner)
    grad_share = share.new_empty(share.shape)
    grad_share.view(-1)[order] = (grad * active).mul_(up).sum(dim=-1)
    grad = grad * share.flatten()[order, None]
    grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
    torch.mul(grad, active, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grad_inner, grad_share
