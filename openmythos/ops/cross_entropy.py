"""Next-token cross-entropy with z-loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

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
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = wide.flatten(0, -2)
    loss = functional.cross_entropy(flat, targets.flatten(), reduction="none", ignore_index=IGNORED)
    if z_loss:
        counted = targets.flatten() != IGNORED
        loss = loss + z_loss * flat.logsumexp(dim=-1).square() * counted
    return loss.view(targets.shape)
