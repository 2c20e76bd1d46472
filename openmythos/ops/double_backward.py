"""Second derivatives of functions whose gradient is a kernel that autograd cannot follow."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_gradients(
    ctx: Any, function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a function's inputs that can themselves be differentiated.

    For the backward pass of a Function whose kernel cannot: ``function`` is made of torch's
    operators.
    """
    needs = ctx.needs_input_grad[: len(inputs)]
    pairs = zip(inputs, needs, strict=True)
    wanted = [tensor for tensor, need in pairs if need and tensor is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)
