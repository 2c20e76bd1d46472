"""Initial weights and initial states: functions of seeds and places alone.

The numbers are hashed, in integers and fp32, not drawn from a generator: each is the same in every
batch, order of construction and part of a matrix.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config import CopyInitConfig, NormalInitConfig, StateInitConfig, ZerosInitConfig
from openmythos.model.context import ForwardContext

CUT = 3.0  # normal distributions are truncated at this many standard deviations
DRAWN_AT_ONCE = 2**16  # weights; more would leave the processor's cache

# --- numbers from keys ---------------------------------------------------------------------------

Number = int | Int[Tensor, "..."]
Key = tuple[Number, Number]  # two words of 32 bits

_WORD = 0xFFFFFFFF
_START: Key = (0x243F6A88, 0x85A308D3)  # the digits of pi, as are the constants of the rounds
_ROUNDS = (0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)

# Rational approximation of sqrt(2) erfinv(x erf(3 / sqrt(2))) / x in 1 - x^2, which loses no digits
# near the cut; relative error in fp32 2.6e-6.
_OVER = (
    *(38576.23936727685, 275105.30017680756, 174474.5714676271),
    *(20225.505221188978, 523.968419846096, 2.99999332615558),
)
_UNDER = (
    *(77356.96020575661, 225156.4892079237, 95734.76643810298),
    *(8706.52764150997, 192.89537894223713, 1.0),
)


def derive(key: Key, number: Number) -> Key:
    """The key of a number of 64 bits under a key: numbers that differ get keys that differ.

    Source: Feistel's network, over the hash of ``_mix``.
    """
    low, high = key[0] ^ (number & _WORD), key[1] ^ ((number >> 32) & _WORD)
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


def truncated_normal(key: Key, width: int) -> Float[Tensor, "... width"]:
    """Numbers of a normal distribution of std 1, truncated at ``CUT``, for each key of a tensor.

    Only operations that IEEE 754 rounds in one way: the place in a tensor makes no difference.
    """
    low, high = key
    assert isinstance(low, Tensor) and isinstance(high, Tensor)
    channels = torch.arange(width, device=low.device)
    bits = _mix(_mix(channels ^ low[..., None]) ^ high[..., None])
    uniform = ((bits >> 8) * 2 - (2**24 - 1)).float() * 2**-24  # in (-1, 1), symmetric and exact
    x = (1 - uniform) * (1 + uniform)
    over, under = torch.full_like(x, _OVER[0]), torch.full_like(x, _UNDER[0])
    for a, b in zip(_OVER[1:], _UNDER[1:], strict=True):
        over, under = over * x + a, under * x + b
    return uniform * (over / under)


# --- weights -------------------------------------------------------------------------------------


def normal_rows(seed: int, name: str, rows: range, width: int) -> Float[Tensor, "R width"]:
    """Rows of a parameter's initial values, before their scale; every row can be drawn alone.

    Args:
        seed: Of the model.
        name: The parameter's, in the model's state dict.
        rows: Rows of the parameter as a matrix: its last dimension by all others.
        width: Size of the last dimension.
    """
    digest = hashlib.sha256(name.encode()).digest()
    key = derive(derive(_START, seed), int.from_bytes(digest[:8], "little"))
    return truncated_normal(derive(key, torch.arange(rows.start, rows.stop)), width)


@torch.no_grad()
def init_weights(model: nn.Module, d_model: int, seed: int) -> None:
    """Draw weights from truncated normals of std sqrt(2 / (5 d_model)), except for some zeros.

    They depend on (seed, parameter name, row, column) alone.

    The output projections of attention and feed-forward are zero, so every block, and with it the
    core, starts as the identity. If a norm follows the projection, the norm's weight is zero
    instead, because the gradient of a norm at zero input is 1 / sqrt(eps). Norms, decays and LoRA's
    up-projections keep the values of their constructors.

    A module can state exceptions: ``drawn`` names further parameters to draw, besides the weights
    of linear layers and embeddings, and its ``init_weights()`` is called after all are drawn.

    Source: Takase et al. 2023 (arXiv 2312.16903), as used by Huginn and Parcae.
    """
    std = math.sqrt(2 / (5 * d_model))
    for prefix, module in model.named_modules():
        names = list(getattr(module, "drawn", ()))
        if isinstance(module, nn.Linear | nn.Embedding):
            names.append("weight")
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for name in names:
            tensor = getattr(module, name)
            matrix = tensor.view(-1, tensor.shape[-1])
            step = max(1, DRAWN_AT_ONCE // matrix.shape[1])
            for start in range(0, len(matrix), step):
                rows = range(start, min(start + step, len(matrix)))
                drawn = normal_rows(seed, f"{prefix}.{name}", rows, matrix.shape[1])
                matrix[rows.start : rows.stop] = std * drawn
    for module in model.modules():
        own = getattr(module, "init_weights", None)
        if own is not None:
            own()


def derive_seeds(*numbers: Number) -> Int[Tensor, "..."]:
    """Seeds that depend on all of the numbers, for example a run's seed, step, row and document."""
    key = _START
    for number in numbers:
        key = derive(key, number)
    low, high = key
    return torch.as_tensor(((high & 0x7FFFFFFF) << 32) | low)


# --- initial states ------------------------------------------------------------------------------


def _zeros(
    part: ZerosInitConfig, e: Float[Tensor, "B T D"], ctx: ForwardContext
) -> Float[Tensor, "B T D"]:
    return torch.zeros_like(e)


def _copy(
    part: CopyInitConfig, e: Float[Tensor, "B T D"], ctx: ForwardContext
) -> Float[Tensor, "B T D"]:
    return e


def _normal(
    part: NormalInitConfig, e: Float[Tensor, "B T D"], ctx: ForwardContext
) -> Float[Tensor, "B T D"]:
    key = derive(derive(_START, ctx.seeds), ctx.positions)
    return (part.std * truncated_normal(key, e.shape[-1])).to(e.dtype)


STATE_INITS: dict[type, Callable[..., Tensor]] = {
    ZerosInitConfig: _zeros,
    CopyInitConfig: _copy,
    NormalInitConfig: _normal,
}


def initial_state(
    config: StateInitConfig, e: Float[Tensor, "B T D"], ctx: ForwardContext
) -> Float[Tensor, "B T D"]:
    """h_0: zeros, e, or noise that depends only on (the token's seed, position, channel)."""
    return STATE_INITS[type(config)](config, e, ctx)
