"""Second derivatives for autograd Functions whose backward is a kernel without a derivative."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_gradients(
    ctx: Any, function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a Function's inputs, computed so that autograd can differentiate them again.

    Call it in ``backward`` instead of the kernel when the gradient needs a graph.

    Args:
        ctx: The Function's context.
        function: The same function of ``inputs``, written in torch's operators.
        inputs: The first inputs of the Function.
        grad: The gradient of its output.
    """
    needs = ctx.needs_input_grad[: len(inputs)]
    pairs = zip(inputs, needs, strict=True)
    wanted = [tensor for tensor, need in pairs if need and tensor is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)
