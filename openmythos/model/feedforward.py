"""Feed-forward layers: dense, and a mixture of experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from openmythos.config import (
    FeedForwardConfig,
    ModelConfig,
    MoEConfig,
    ReLUSquaredConfig,
    SwiGLUConfig,
    WeightLoRAConfig,
)
from openmythos.model.context import ForwardContext
from openmythos.model.loop_signal import LoopLinear
from openmythos.ops.cpu import build as native
from openmythos.ops.moe import LoopedExperts, moe_experts
from openmythos.ops.swiglu import swiglu


class FeedForward(nn.Module):
    """Base of all feed-forward layers, called as ``(x, loop_idx, ctx)``.

    ``lora`` is the LoRA per loop of its linear layers, in the core.
    """

    down: Any  # the output projection

    def __init__(
        self, config: ModelConfig, part: FeedForwardConfig, lora: WeightLoRAConfig | None = None
    ) -> None:
        super().__init__()

    def zero_output(self) -> None:
        """Set the output projection to zero, so that the branch starts by adding nothing."""
        self.down.weight.zero_()


class SwiGLU(FeedForward):
    """``down(SiLU(gate x) * up x)``; gate and up are stored as one matrix.

    Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
    """

    def __init__(
        self, config: ModelConfig, part: SwiGLUConfig, lora: WeightLoRAConfig | None = None
    ) -> None:
        super().__init__(config, part, lora)
        self.gate_up = LoopLinear(config.d_model, 2 * part.d_ff, lora)
        self.down = LoopLinear(part.d_ff, config.d_model, lora)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"] | None = None,
        ctx: ForwardContext | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Apply to every token."""
        return self.down(swiglu(self.gate_up(x, loop_idx)), loop_idx)


class ReLUSquared(FeedForward):
    """``down(scale * relu(up x)^2)``.

    Source: So et al. 2021, Primer (arXiv 2109.08668), section 3.
    """

    def __init__(
        self, config: ModelConfig, part: ReLUSquaredConfig, lora: WeightLoRAConfig | None = None
    ) -> None:
        super().__init__(config, part, lora)
        self.scale = part.scale
        self.up = LoopLinear(config.d_model, part.d_ff, lora)
        self.down = LoopLinear(part.d_ff, config.d_model, lora)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"] | None = None,
        ctx: ForwardContext | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Apply to every token."""
        hidden = functional.relu(self.up(x, loop_idx)).square()
        if self.scale != 1:
            hidden = hidden * self.scale
        return self.down(hidden, loop_idx)


class Router(nn.Linear):
    """The router's logits, in at least fp32: rounding to bf16 could change the chosen experts."""

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """One logit per token and expert."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(wide), self.weight.to(wide))


class MoE(FeedForward):
    """Routed experts, chosen per token and loop, plus shared experts that always run.

    Experts are selected by score + bias and weighted by the score alone; no token is dropped. In
    training mode, ``load`` counts the real tokens routed to each expert per loop; ``update_bias``
    reads and clears it. Both have ``bias_loops`` rows; later loops use the last row.

    Source: DeepSeek-V3 (arXiv 2412.19437), equations 12 to 16; Wang et al. 2024 (arXiv 2408.15664).
    """

    drawn = ("gate_up", "down")  # see ``init_weights``

    def __init__(
        self, config: ModelConfig, part: MoEConfig, lora: WeightLoRAConfig | None = None
    ) -> None:
        super().__init__(config, part, lora)
        self.config = part
        d_model, num_experts, width = config.d_model, part.num_experts, part.d_expert
        self.router = Router(d_model, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, width))
        # The sum of the shared experts is computed as one wider expert.
        shared_width = part.num_shared_experts * part.shared_width
        self.shared: SwiGLU | None = None
        if shared_width:
            self.shared = SwiGLU(config, SwiGLUConfig(d_ff=shared_width), lora)
        self.bias: Tensor
        self.load: Tensor
        # Not in the default dtype: updates are too small for bf16.
        bias = torch.zeros(part.bias_loops, num_experts, dtype=torch.float32)
        self.register_buffer("bias", bias)
        load = torch.zeros(part.bias_loops, num_experts, dtype=torch.int64)
        self.register_buffer("load", load, persistent=False)

    def zero_output(self) -> None:
        """See ``FeedForward.zero_output``."""
        self.down.zero_()
        if self.shared is not None:
            self.shared.zero_output()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        """Keep the bias's dtype when the model is cast: its updates are too small for bf16."""
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"] | None = None,
        ctx: ForwardContext | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Apply to every token the experts that it is routed to, and the shared ones."""
        num_rows, num_tokens, d_model = x.shape
        if loop_idx is None or self.config.bias_loops == 1:
            row = torch.zeros(num_rows * num_tokens, dtype=torch.int64, device=x.device)
        else:
            row = loop_idx.clamp(max=self.config.bias_loops - 1).repeat_interleave(num_tokens)
        flat = x.reshape(-1, d_model)
        expert, weight, counts = self.route(flat, row, ctx)
        y = self.experts(ctx)(flat, expert, weight.to(x.dtype), counts).view(x.shape)
        return y if self.shared is None else y + self.shared(x, loop_idx)

    def experts(self, ctx: ForwardContext | None) -> Callable[..., Tensor]:
        """The routed experts as a function; eager on a CPU, all loops of a forward share it."""
        own = getattr(self.gate_up, "experts", None)  # that of weights in 8 bits
        if own is not None:
            return partial(own, self.down)
        given = None if ctx is None else ctx.experts
        if given is not None or self.gate_up.device.type != "cpu" or not native.eager():
            return partial(given or moe_experts, gate_up=self.gate_up, down=self.down)
        if ctx is None:
            return LoopedExperts(self.gate_up, self.down)
        return ctx.once(LoopedExperts, self.gate_up, self.down)

    def route(
        self, x: Float[Tensor, "N D"], row: Int[Tensor, "N"], ctx: ForwardContext | None = None
    ) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"], Int[Tensor, "E"]]:
        """Each token's K experts, their weights, and the number of tokens per expert.

        ``row`` is the row of ``bias`` for each token.
        """
        part = self.config
        logits = self.router(x)
        scores = logits.sigmoid() if part.scoring == "sigmoid" else logits.softmax(dim=-1)
        # With softmax, the original adds the bias to the logits, not to the scores.
        selection = scores if part.scoring == "sigmoid" else logits
        expert = (selection.detach() + self.bias[row]).topk(part.num_experts_per_token).indices
        weight = scores.gather(1, expert)
        total = weight.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
        weight = part.routed_scale * weight / total
        pair = (row[:, None] * part.num_experts + expert).flatten()
        none = torch.zeros(self.load.numel(), dtype=torch.int64, device=x.device)
        load = none.index_add(0, pair, torch.ones_like(pair)).view(self.load.shape)
        # A function that torch.func transforms may not change a buffer.
        pure = not native.eager() and not torch.compiler.is_compiling()
        if self.training and not pure:
            counted, real = load, None if ctx is None else ctx.real
            if real is not None:
                count = real.flatten().repeat_interleave(part.num_experts_per_token).long()
                counted = none.index_add(0, pair, count).view(self.load.shape)
            self.load += counted if ctx is None or ctx.counts is None else counted * ctx.counts
        return expert, weight, load.sum(dim=0)

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """Move each bias by ``rate``: up below the mean load, down above it; clear ``load``.

        Call it after each optimiser step; with several processes, sum ``load`` over them before.
        """
        load = self.load.float()
        seen = load.sum(dim=1, keepdim=True) > 0
        self.bias += rate * torch.sign(load.mean(dim=1, keepdim=True) - load) * seen
        self.load.zero_()


FEED_FORWARDS: dict[type, type[FeedForward]] = {
    SwiGLUConfig: SwiGLU,
    ReLUSquaredConfig: ReLUSquared,
    MoEConfig: MoE,
}


def make_feed_forward(
    config: ModelConfig, part: FeedForwardConfig, lora: WeightLoRAConfig | None
) -> FeedForward:
    """The feed-forward that ``part`` names."""
    return FEED_FORWARDS[type(part)](config, part, lora)


def max_violation(load: Int[Tensor, "L E"]) -> Float[Tensor, "L"]:
    """MaxVio per loop, max load / mean load - 1: 0 is perfect balance, E - 1 a single expert."""
    return load.amax(dim=-1) / load.float().mean(dim=-1).clamp(min=1e-9) - 1
