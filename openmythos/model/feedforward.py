"""Feed-forward layers: dense, and a mixture of experts."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

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
from openmythos.ops.moe import LoopedExperts, moe_experts
from openmythos.ops.swiglu import swiglu


class FeedForward(nn.Module, ABC):
    """Called as ``(x, loop_idx, ctx)``; ``lora`` is what each loop adds to its linear layers."""

    def __init__(
        self, config: ModelConfig, part: FeedForwardConfig, lora: WeightLoRAConfig | None = None
    ) -> None:
        super().__init__()

    @abstractmethod
    def zero_output(self) -> None:
        """Start as a branch that adds nothing."""


class SwiGLU(FeedForward):
    """``down(SiLU(gate x) * up x)``; gate and up are one matrix.

    Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
    """

    def __init__(
        self, config: ModelConfig, part: SwiGLUConfig, lora: WeightLoRAConfig | None = None
    ) -> None:
        super().__init__(config, part, lora)
        self.gate_up = LoopLinear(config.d_model, 2 * part.d_ff, lora)
        self.down = LoopLinear(part.d_ff, config.d_model, lora)

    def zero_output(self) -> None:
        """See ``FeedForward.zero_output``."""
        self.down.weight.zero_()

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

    def zero_output(self) -> None:
        """See ``FeedForward.zero_output``."""
        self.down.weight.zero_()

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
    """Scores of the experts, in at least fp32: in bf16, rounding would choose experts."""

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """Logits of every token."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(wide), self.weight.to(wide))


class MoE(FeedForward):
    """Routed experts, chosen per token and loop, plus shared experts that always run.

    Experts are selected by score + bias and weighted by the score alone; no token is dropped. While
    training, ``load`` counts the pairs of each (loop, expert); ``update_bias`` reads and clears it.
    Loops past the ``bias_loops`` rows use the last row.

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
        # The shared experts' sum is one wider expert.
        shared_width = part.num_shared_experts * part.shared_width
        self.shared: SwiGLU | None = None
        if shared_width:
            self.shared = SwiGLU(config, SwiGLUConfig(d_ff=shared_width), lora)
        self.bias: Tensor
        self.load: Tensor
        self.register_buffer("bias", torch.zeros(part.bias_loops, num_experts))
        load = torch.zeros(part.bias_loops, num_experts, dtype=torch.int64)
        self.register_buffer("load", load, persistent=False)

    def zero_output(self) -> None:
        """See ``FeedForward.zero_output``."""
        self.down.zero_()
        if self.shared is not None:
            self.shared.zero_output()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        """Keep the bias as it is in a cast of the model: bf16 would swallow its small steps."""
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
        """Route every token."""
        num_rows, num_tokens, d_model = x.shape
        if loop_idx is None or self.config.bias_loops == 1:
            row = torch.zeros(num_rows * num_tokens, dtype=torch.int64, device=x.device)
        else:
            row = loop_idx.clamp(max=self.config.bias_loops - 1).repeat_interleave(num_tokens)
        flat = x.reshape(-1, d_model)
        expert, weight, counts = self.route(flat, row)
        y = self._experts(ctx)(flat, expert, weight.to(x.dtype), counts).view(x.shape)
        return y if self.shared is None else y + self.shared(x, loop_idx)

    def _experts(self, ctx: ForwardContext | None) -> Callable[..., Tensor]:
        """The routed experts as a function; on a CPU one for all loops of a forward."""
        if self.gate_up.device.type != "cpu" or torch.compiler.is_compiling():
            return partial(moe_experts, gate_up=self.gate_up, down=self.down)
        make = partial(LoopedExperts, self.gate_up, self.down)
        return make() if ctx is None else ctx.once((self, torch.is_grad_enabled()), make)

    def route(
        self, x: Float[Tensor, "N D"], row: Int[Tensor, "N"]
    ) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"], Int[Tensor, "E"]]:
        """Experts, their weights, and each expert's count of tokens; ``row`` chooses the bias."""
        part = self.config
        logits = self.router(x)
        scores = logits.sigmoid() if part.scoring == "sigmoid" else logits.softmax(dim=-1)
        # The original selects by logits + bias; with a bias of zero the order is the same.
        selection = scores if part.scoring == "sigmoid" else logits
        expert = (selection.detach() + self.bias[row]).topk(part.num_experts_per_token).indices
        weight = scores.gather(1, expert)
        total = weight.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
        weight = part.routed_scale * weight / total
        pair = (row[:, None] * part.num_experts + expert).flatten()
        load = torch.zeros(self.load.numel(), dtype=torch.int64, device=x.device)
        load = load.index_add(0, pair, torch.ones_like(pair)).view(self.load.shape)
        if self.training:
            self.load += load
        return expert, weight, load.sum(dim=0)

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """Move every loop's bias by ``rate`` against its load, and clear the statistics.

        Call after each optimiser step; with several processes, sum ``load`` over them before.
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
    """Max load / mean load - 1 of each loop: 0 is perfect balance, E - 1 is collapse (MaxVio)."""
    return load.amax(dim=-1) / load.float().mean(dim=-1).clamp(min=1e-9) - 1
