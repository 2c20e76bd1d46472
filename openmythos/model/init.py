"""Initial weights and initial states."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config import CopyInitConfig, NormalInitConfig, StateInitConfig
from openmythos.model.attention import GQA, MLA
from openmythos.model.block import Block
from openmythos.model.feedforward import MoE, ReLUSquared, SwiGLU
from openmythos.model.halting import Halting
from openmythos.model.injection import GateInjection
from openmythos.model.loop_signal import LoopLinear, OutputLoRA

CUT = 3.0  # truncated normals are cut at this many standard deviations


@torch.no_grad()
def init_weights(model: nn.Module, d_model: int, generator: torch.Generator | None = None) -> None:
    """Truncated normals of std sqrt(2 / (5 d_model)); projections back to the stream are zero.

    Zero output projections make every block the identity at the start, so looping starts as
    identity; norms, decays and low-rank ups keep the values that their modules gave them. Where a
    norm ends the branch its weight is zero instead: a norm's gradient at zero is 1/sqrt(eps).

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
        if isinstance(module, LoopLinear) and module.lora is not None:
            draw(module.lora_down)
        if isinstance(module, MoE):
            draw(module.gate_up)
            draw(module.down)
    for module in model.modules():
        if isinstance(module, Block):
            _zero_outputs(module)
        if isinstance(module, OutputLoRA):
            module.up.weight.zero_()
        if isinstance(module, Halting):
            module.proj.weight.zero_()
            module.proj.bias.fill_(module.bias_init)
        if isinstance(module, GateInjection):
            module.gate.bias.fill_(module.bias_init)


def _zero_outputs(block: Block) -> None:
    if block.norm == "peri":
        block.attention_out_norm.weight.zero_()
        block.feed_forward_out_norm.weight.zero_()
        return
    assert isinstance(block.attention, GQA | MLA)
    block.attention.out.weight.zero_()
    feed_forward: nn.Module | None = block.feed_forward
    if isinstance(feed_forward, MoE):
        feed_forward.down.zero_()
        feed_forward = feed_forward.shared
    if isinstance(feed_forward, SwiGLU | ReLUSquared):
        feed_forward.down.weight.zero_()


def initial_state(
    config: StateInitConfig,
    e: Float[Tensor, "B T D"],
    positions: Int[Tensor, "B T"],
    generator: torch.Generator | None,
) -> Float[Tensor, "B T D"]:
    """h_0: zeros, e, or noise that depends on (seed, position, channel) alone.

    The noise is hashed, not drawn in order, so that a row's state is the same in every batch, chunk
    and padding. One number is drawn from ``generator`` for the seed (0 without a generator).
    """
    if isinstance(config, CopyInitConfig):
        return e
    if not isinstance(config, NormalInitConfig):
        return torch.zeros_like(e)
    seed = 0
    if generator is not None:
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    channels = torch.arange(e.shape[-1], device=e.device)
    # Channels are hashed before they meet the position: sums of the two would repeat in runs.
    bits = _mix(_mix(positions + 1) + seed)[..., None] ^ _mix(channels + 1)
    uniform = (_mix(_mix(bits)).double() + 0.5) / 2**31
    tail = math.erf(CUT / math.sqrt(2))
    noise = torch.erfinv((2 * uniform - 1) * tail) * math.sqrt(2)
    return (config.std * noise).to(e.dtype)


def _mix(bits: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """A 31-bit integer hash (xor-shift and multiply); exact in int64 on every device."""
    bits = bits & 0x7FFFFFFF
    bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
    return bits ^ (bits >> 16)
