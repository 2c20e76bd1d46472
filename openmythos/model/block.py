"""One transformer block: attention and feed-forward, with the norms where the config says."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config import ModelConfig
from openmythos.model.attention import make_attention
from openmythos.model.cache import Stage
from openmythos.model.context import ForwardContext
from openmythos.model.feedforward import make_feed_forward
from openmythos.model.norm import RMSNorm


class Block(nn.Module):
    """Attention, then feed-forward, each on a residual branch."""

    def __init__(self, config: ModelConfig, stage: Stage, layer: int, global_layer: int) -> None:
        super().__init__()
        part, dim, eps = config.block, config.d_model, config.block.norm_eps
        self.norm = part.norm
        self.attention = make_attention(config, stage, layer, global_layer)
        feed_forward = config.core_ff if stage == "core" else config.feed_forward
        self.feed_forward = make_feed_forward(config, feed_forward, self.attention.lora)
        self.attention_norm = RMSNorm(dim, eps)
        self.feed_forward_norm = RMSNorm(dim, eps)
        if part.norm != "pre":
            self.attention_out_norm = RMSNorm(dim, eps)
            self.feed_forward_out_norm = RMSNorm(dim, eps)
        self.attention_scale = self.feed_forward_scale = None
        if part.layer_scale is not None:
            self.attention_scale = nn.Parameter(torch.full((dim,), part.layer_scale))
            self.feed_forward_scale = nn.Parameter(torch.full((dim,), part.layer_scale))

    def init_weights(self) -> None:
        """Start as the identity, through the outputs or, where a norm ends the branch, there."""
        if self.norm == "peri":
            self.attention_out_norm.weight.zero_()
            self.feed_forward_out_norm.weight.zero_()
        else:
            self.attention.zero_output()
            self.feed_forward.zero_output()

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        ctx: ForwardContext,
        loop_idx: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Apply the block; ``loop_idx`` is each row's loop in the core, None elsewhere."""
        y = self.attention(self.attention_norm(x), ctx, loop_idx)
        if self.attention_scale is not None:
            y = y * self.attention_scale
        x = self._add(x, y, self.attention_out_norm if self.norm != "pre" else None)
        y = self.feed_forward(self.feed_forward_norm(x), loop_idx, ctx)
        if self.feed_forward_scale is not None:
            y = y * self.feed_forward_scale
        return self._add(x, y, self.feed_forward_out_norm if self.norm != "pre" else None)

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return x + y
        return x + norm(y) if self.norm == "peri" else norm(x + y)
