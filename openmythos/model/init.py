"""Initial weights and states: functions of seeds and places alone.

Their numbers are hashed in integers and fp32, not drawn from a generator, so that each is the same
in every batch, order of construction and part of a matrix.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config import CopyInitConfig, NormalInitConfig, ZerosInitConfig
from openmythos.model.context import ForwardContext

CUT = 3.0  # normal distributions are truncated at this many standard deviations
DRAWN_AT_ONCE = 2**16  # weights; more would leave the processor's cache
_WORD = 0xFFFFFFFF
_START: Any = (0x243F6A88, 0x85A308D3)  # the digits of pi, as are the constants of the rounds
_ROUNDS = (0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
# Rational approximation of sqrt(2) erfinv(x erf(CUT / sqrt(2))) / x in 1 - x^2, which loses no
# digits near the cut; relative error in fp32 2.6e-6.
_OVER = (38576.2394, 275105.3, 174474.571, 20225.5052, 523.968420, 2.99999333)
_UNDER = (77356.9602, 225156.489, 95734.7664, 8706.52764, 192.895379, 1.0)

Number = int | Int[Tensor, "..."]


def derive(*numbers: Number) -> tuple[Number, Number]:
    """A key of two 32-bit words; a Feistel network: if only the last number differs, so does it."""
    low, high = _START
    for number in numbers:
        low, high = low ^ (number & _WORD), high ^ ((number >> 32) & _WORD)
        for constant in _ROUNDS:
            low, high = high ^ _mix((low + constant) & _WORD), low
    return low, high


def _mix(word: Any) -> Any:
    """A hash of 32 bits. No product exceeds int64, so that it is exact on every device.

    Source: Wellons, hash-prospector (github.com/skeeto/hash-prospector), the best of two rounds.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


def truncated_normal(key: tuple[Number, Number], width: int) -> Float[Tensor, "... width"]:
    """Numbers of a normal distribution of std 1, truncated at ``CUT``, for each key of a tensor.

    Only operations that IEEE 754 rounds in one way: the place in a tensor makes no difference.
    """
    low, high = map(torch.as_tensor, key)
    channels = torch.arange(width, device=low.device)
    bits = _mix(_mix(channels ^ low[..., None]) ^ high[..., None])
    uniform = ((bits >> 8) * 2 - (2**24 - 1)).float() * 2**-24  # in (-1, 1), symmetric and exact
    x = (1 - uniform) * (1 + uniform)
    over, under = torch.full_like(x, _OVER[0]), torch.full_like(x, _UNDER[0])
    for a, b in zip(_OVER[1:], _UNDER[1:], strict=True):
        over, under = over * x + a, under * x + b
    return uniform * (over / under)


def normal_rows(seed: int, name: str, rows: Int[Tensor, "R"], width: int) -> Float[Tensor, "R W"]:
    """Some rows, each drawn alone, of a parameter as a matrix: its last dimension by all others."""
    named = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return truncated_normal(derive(seed, named, rows), width)


@torch.no_grad()
def init_weights(model: nn.Module, d_model: int, seed: int, part_of: Any = None) -> None:
    """Draw weights from truncated normals of std sqrt(2 / (5 d_model)), except for some zeros.

    The output projections of attention and feed-forward are zero, so every block, and with it the
    core, starts as the identity. If a norm follows the projection, the norm's weight is zero
    instead, because the gradient of a norm at zero input is 1 / sqrt(eps). Norms, decays and LoRA's
    up-projections keep the values of their constructors.

    A module can state exceptions: ``drawn`` names further parameters to draw, besides the weights
    of linear layers and embeddings, and its ``init_weights()`` is called after all are drawn.
    ``part_of`` gives the part of a parameter that is here, if it is split: values, rows, columns.

    Source: Takase et al. 2023 (arXiv 2312.16903), as used by Huginn and Parcae.
    """
    std = math.sqrt(2 / (5 * d_model))
    part_of = part_of or (lambda _, w: (w.flatten(0, -2), torch.arange(w[..., 0].numel()), ...))
    for prefix, module in model.named_modules():
        names = list(getattr(module, "drawn", ()))
        if isinstance(module, nn.Linear | nn.Embedding):
            names.append("weight")
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for name in names:
            param = getattr(module, name)
            width, (here, rows, at) = param.shape[-1], part_of(f"{prefix}.{name}", param)
            step = max(1, DRAWN_AT_ONCE // width)
            for part, numbers in zip(here.split(step), rows.split(step), strict=True):
                part.copy_(std * normal_rows(seed, f"{prefix}.{name}", numbers, width)[:, at])
    for module in model.modules():
        own = getattr(module, "init_weights", None)
        if own is not None:
            own()


def _normal(
    part: NormalInitConfig, e: Float[Tensor, "B T D"], ctx: ForwardContext
) -> Float[Tensor, "B T D"]:
    noise = truncated_normal(derive(ctx.seeds, ctx.positions), e.shape[-1])
    return (part.std * noise).to(e.dtype)


STATE_INITS: dict[type, Callable[..., Tensor]] = {
    ZerosInitConfig: lambda part, e, ctx: torch.zeros_like(e),
    CopyInitConfig: lambda part, e, ctx: e,
    NormalInitConfig: _normal,
}
