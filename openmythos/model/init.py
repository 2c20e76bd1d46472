"""Initial weights and initial states."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config import CopyInitConfig, NormalInitConfig, StateInitConfig, ZerosInitConfig

CUT = 3.0  # truncated normals are cut at this many standard deviations


@torch.no_grad()
def init_weights(model: nn.Module, d_model: int, generator: torch.Generator | None = None) -> None:
    """Truncated normals of std sqrt(2 / (5 d_model)); projections back to the stream are zero.

    Zero output projections make every block the identity at the start, so looping starts as
    identity; norms, decays and low-rank ups keep the values that their modules gave them. Where a
    norm ends the branch its weight is zero instead: a norm's gradient at zero is 1/sqrt(eps).

    A module says what is its own: ``drawn`` names parameters to draw besides those of linear layers
    and embeddings, and ``init_weights()`` sets what does not start as drawn.

    Source: Takase et al. 2023 (arXiv 2312.16903), as used by Huginn and Parcae.
    """
    std = math.sqrt(2 / (5 * d_model))

    def draw(tensor: Tensor) -> None:
        nn.init.trunc_normal_(tensor, 0.0, std, -CUT * std, CUT * std, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            draw(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for name in getattr(module, "drawn", ()):
            draw(getattr(module, name))
    for module in model.modules():
        own = getattr(module, "init_weights", None)
        if own is not None:
            own()


def _zeros(
    part: ZerosInitConfig,
    e: Float[Tensor, "B T D"],
    positions: Int[Tensor, "B T"],
    generator: torch.Generator | None,
) -> Float[Tensor, "B T D"]:
    return torch.zeros_like(e)


def _copy(
    part: CopyInitConfig,
    e: Float[Tensor, "B T D"],
    positions: Int[Tensor, "B T"],
    generator: torch.Generator | None,
) -> Float[Tensor, "B T D"]:
    return e


def _normal(
    part: NormalInitConfig,
    e: Float[Tensor, "B T D"],
    positions: Int[Tensor, "B T"],
    generator: torch.Generator | None,
) -> Float[Tensor, "B T D"]:
    """Hashed, not drawn in order, so that a row's state is the same in every batch and chunk."""
    seed = 0
    if generator is not None:
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    channels = torch.arange(e.shape[-1], device=e.device)
    # Channels are hashed before they meet the position: sums of the two would repeat in runs.
    bits = _mix(_mix(positions + 1) + seed)[..., None] ^ _mix(channels + 1)
    uniform = (_mix(_mix(bits)).double() + 0.5) / 2**31
    tail = math.erf(CUT / math.sqrt(2))
    noise = torch.erfinv((2 * uniform - 1) * tail) * math.sqrt(2)
    return (part.std * noise).to(e.dtype)


def _mix(bits: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """A 31-bit integer hash (xor-shift and multiply); exact in int64 on every device."""
    bits = bits & 0x7FFFFFFF
    bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
    return bits ^ (bits >> 16)


STATE_INITS: dict[type, Callable[..., Tensor]] = {
    ZerosInitConfig: _zeros,
    CopyInitConfig: _copy,
    NormalInitConfig: _normal,
}


def initial_state(
    config: StateInitConfig,
    e: Float[Tensor, "B T D"],
    positions: Int[Tensor, "B T"],
    generator: torch.Generator | None,
) -> Float[Tensor, "B T D"]:
    """h_0: zeros, e, or noise that depends on (seed, position, channel) alone.

    The noise is the same in every batch, chunk and padding. One number is drawn from ``generator``
    for the seed (0 without a generator).
    """
    return STATE_INITS[type(config)](config, e, positions, generator)
