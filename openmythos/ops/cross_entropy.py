"""Next-token cross-entropy with z-loss, of many logits by chunks.

The loss needs its logits in float32 three times: they, their logarithms, the gradient. Of a large
vocabulary that is more than the model's states. By chunks, only the logits and their gradient are
ever whole, in the logits' own precision.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from openmythos.ops.cpu import build as native

CHUNK = 2**26  # logits whose loss is computed at once
IGNORED = -100  # target of tokens without loss


def cross_entropy_reference(
    logits: Float[Tensor, "... V"], targets: Int[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Loss in nats per token, written out; 0 where the target is ``IGNORED``."""
    log_probs = logits.float().log_softmax(dim=-1)
    picked = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -picked * (targets != IGNORED)


def cross_entropy(
    logits: Float[Tensor, "... V"], targets: Int[Tensor, "..."], z_loss: float = 0.0
) -> Float[Tensor, "..."]:
    """Loss in nats per token, plus ``z_loss * logsumexp(logits)^2``; 0 where ``IGNORED``."""
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    rows = max(1, CHUNK // flat.shape[-1])
    if len(flat) > rows and native.eager():
        loss: Tensor = _Chunked.apply(flat, wanted, z_loss, rows)
    else:
        loss = _whole(flat, wanted, z_loss)
    return loss.view(targets.shape)


def _whole(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"], z_loss: float
) -> Float[Tensor, "N"]:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = functional.cross_entropy(wide, targets, reduction="none", ignore_index=IGNORED)
    if z_loss:
        loss = loss + z_loss * wide.logsumexp(dim=-1).square() * (targets != IGNORED)
    return loss


class _Chunked(torch.autograd.Function):
    """``_whole`` of ``rows`` rows at a time; the backward pass computes each chunk again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, targets: Tensor, z_loss: float, rows: int
    ) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.z_loss, ctx.rows = z_loss, rows  # type: ignore[attr-defined]
        chunks = zip(logits.split(rows), targets.split(rows), strict=True)
        return torch.cat([_whole(*chunk, z_loss) for chunk in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        found = torch.empty_like(logits)
        parts = (each.split(ctx.rows) for each in (logits, targets, grad, found))
        for some, wanted, outer, into in zip(*parts, strict=True):
            with torch.enable_grad():
                leaf = some.detach().requires_grad_()
                loss = _whole(leaf, wanted, ctx.z_loss)
            into.copy_(torch.autograd.grad(loss, leaf, outer)[0])
        return found, None, None, None
