"""Grouped-query and multi-head latent attention over the loop-aware cache."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config import AttentionConfig, GQAConfig, MLAConfig, ModelConfig
from openmythos.model.cache import Stage
from openmythos.model.context import ForwardContext
from openmythos.model.loop_signal import LoopLinear
from openmythos.model.norm import RMSNorm, rms_norm
from openmythos.model.rope import apply_rope
from openmythos.ops.attention import attention, depth_attention


class Attention(nn.Module):
    """What both kinds share: their place in the model, rotary positions, the cache.

    ``global_layer`` counts prelude, core, coda through.
    """

    out: LoopLinear

    def __init__(
        self,
        config: ModelConfig,
        part: AttentionConfig,
        stage: Stage,
        layer: int,
        global_layer: int,
    ) -> None:
        super().__init__()
        self.stage: Stage = stage
        self.layer = layer
        self.interleaved = config.rope is not None and config.rope.interleaved
        self.lora = config.lora(stage)

    def zero_output(self) -> None:
        """Start as a branch that adds nothing."""
        self.out.weight.zero_()

    def rotate(self, x: Float[Tensor, "B T N K"], ctx: ForwardContext) -> Tensor:
        """Apply the context's rotary angles to heads."""
        if ctx.rope is None:
            return x
        return apply_rope(x, ctx.rope, interleaved=self.interleaved)

    def cached(
        self, new: tuple[Tensor, ...], ctx: ForwardContext, loop_idx: Int[Tensor, "B"] | None
    ) -> tuple[Tensor, ...]:
        """Store ``[B heads T dim]`` tensors if there is a cache; return them after older ones."""
        if ctx.cache is None:
            return new
        return ctx.cache.update(
            new,
            stage=self.stage,
            layer=self.layer,
            loop_idx=loop_idx,
            rows=ctx.rows,
            start=ctx.start,
        )


class GQA(Attention):
    """Grouped-query attention; optionally QK-norm, QK-bias (before the rotation), value embeddings.

    Source: Ainslie et al. 2023 (arXiv 2305.13245).
    """

    def __init__(
        self, config: ModelConfig, part: GQAConfig, stage: Stage, layer: int, global_layer: int
    ) -> None:
        super().__init__(config, part, stage, layer, global_layer)
        self.config = part
        self.num_recent_loops = config.num_recent_loops if stage == "core" else 0
        eps = part.qk_norm_eps
        self.norm_eps = config.block.norm_eps if eps is None else eps
        num_heads, num_kv_heads, head_dim = part.num_heads, part.num_kv_heads, part.head_dim
        self.num_qk_heads = num_heads + num_kv_heads
        width = (self.num_qk_heads + num_kv_heads) * head_dim
        self.qkv = LoopLinear(config.d_model, width, self.lora)
        self.out = LoopLinear(num_heads * head_dim, config.d_model, self.lora)
        if part.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(self.num_qk_heads, head_dim))
        if part.qk_norm == "weighted":
            self.q_norm_weight = nn.Parameter(torch.ones(head_dim))
            self.k_norm_weight = nn.Parameter(torch.ones(head_dim))
        table = config.value_embedding
        self.value_table: nn.Embedding | None = None
        if table is not None and global_layer in table.layers:
            self.value_table = nn.Embedding(config.vocab_size, num_kv_heads * head_dim)
            self.value_gate = nn.Linear(table.gate_channels, num_kv_heads, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        ctx: ForwardContext,
        loop_idx: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend causally within the context."""
        part, (num_rows, num_tokens) = self.config, x.shape[:2]
        heads = self.qkv(x, loop_idx).view(num_rows, num_tokens, -1, part.head_dim)
        qk, v = heads.split((self.num_qk_heads, part.num_kv_heads), dim=2)
        q, k = (
            self._position(qk, ctx)
            .transpose(1, 2)
            .split((part.num_heads, part.num_kv_heads), dim=1)
        )
        v = self._add_value_embedding(v, x, ctx).transpose(1, 2)
        scale, fresh = part.head_dim**-0.5, (k, v)
        k, v = self.cached(fresh, ctx, loop_idx)
        if self.num_recent_loops:
            assert loop_idx is not None
            own_k, own_v, visible = self._earlier_loops(fresh, ctx, loop_idx)
            y = depth_attention(q, k, v, ctx.mask, scale, own_k, own_v, visible)
        else:
            y = attention(q, k, v, ctx.mask, scale)
        return self.out(y.transpose(1, 2).reshape(num_rows, num_tokens, -1), loop_idx)

    def _earlier_loops(
        self, fresh: tuple[Tensor, Tensor], ctx: ForwardContext, loop_idx: Int[Tensor, "B"]
    ) -> tuple[Tensor, ...]:
        """The tokens' own keys and values at their last loops, and which of those were run."""
        num, rows = self.num_recent_loops, ctx.rows
        if ctx.cache is not None:
            place = {"start": ctx.start, "stop": ctx.start + fresh[0].shape[2]}
            own = ctx.cache.earlier(num, layer=self.layer, loop_idx=loop_idx, rows=rows, **place)
        else:
            assert ctx.recent is not None
            own = ctx.recent.exchange(fresh, layer=self.layer, rows=rows)
        back = torch.arange(1, num + 1, device=loop_idx.device)
        return *(tensor.to(fresh[0].dtype) for tensor in own), loop_idx[:, None] >= back

    def _position(self, qk: Float[Tensor, "B T N K"], ctx: ForwardContext) -> Tensor:
        part = self.config
        if part.qk_bias:
            qk = qk + self.qk_bias.to(qk.dtype)
        if part.qk_norm != "none":
            qk = rms_norm(qk, self.norm_eps)  # commutes with the rotation up to its weight
        if part.qk_norm == "weighted":
            q_weight = self.q_norm_weight.expand(part.num_heads, -1)
            k_weight = self.k_norm_weight.expand(part.num_kv_heads, -1)
            qk = qk * torch.cat((q_weight, k_weight)).to(qk.dtype)
        return self.rotate(qk, ctx)

    def _add_value_embedding(
        self, v: Float[Tensor, "B T G K"], x: Float[Tensor, "B T D"], ctx: ForwardContext
    ) -> Tensor:
        if self.value_table is None:
            return v
        gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))
        return v + gate[..., None] * self.value_table(ctx.tokens).view(v.shape)


class MLA(Attention):
    """Multi-head latent attention; one latent and one rotary key a token are cached.

    One token after a cache is decoded on the latents themselves: the up-projection is absorbed into
    the query and the output, so the prefix is never expanded again.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
    """

    def __init__(
        self, config: ModelConfig, part: MLAConfig, stage: Stage, layer: int, global_layer: int
    ) -> None:
        super().__init__(config, part, stage, layer, global_layer)
        self.config = part
        eps, rope_dim, latent = config.block.norm_eps, part.qk_rope_head_dim, part.kv_lora_rank
        self.scale = (part.qk_nope_head_dim + rope_dim) ** -0.5
        self.down = LoopLinear(config.d_model, part.q_lora_rank + latent + rope_dim, self.lora)
        self.q_norm = RMSNorm(part.q_lora_rank, eps)
        self.kv_norm = RMSNorm(latent, eps)
        q_width = part.num_heads * (part.qk_nope_head_dim + rope_dim)
        self.q_up = LoopLinear(part.q_lora_rank, q_width, self.lora)
        # Never with LoRA: cached latents are expanded with the weights that all loops share.
        self.kv_up = LoopLinear(latent, part.num_heads * (part.qk_nope_head_dim + part.v_head_dim))
        self.out = LoopLinear(part.num_heads * part.v_head_dim, config.d_model, self.lora)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        ctx: ForwardContext,
        loop_idx: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend causally within the context."""
        part, (num_rows, num_tokens) = self.config, x.shape[:2]
        q_latent, latent, k_rope = self.down(x, loop_idx).split(
            (part.q_lora_rank, part.kv_lora_rank, part.qk_rope_head_dim), dim=-1
        )
        q = self.q_up(self.q_norm(q_latent), loop_idx).view(
            num_rows, num_tokens, part.num_heads, -1
        )
        q_nope, q_rope = q.split((part.qk_nope_head_dim, part.qk_rope_head_dim), dim=-1)
        rotated = self.rotate(torch.cat((q_rope, k_rope[:, :, None]), dim=2), ctx)
        q_rope, k_rope = rotated.split((part.num_heads, 1), dim=2)
        keys = torch.cat((self.kv_norm(latent)[:, :, None], k_rope), dim=-1).transpose(1, 2)
        (keys,) = self.cached((keys,), ctx, loop_idx)
        absorb = num_tokens == 1 and ctx.cache is not None
        attend = self.attend_latents if absorb else self.attend_expanded
        y = attend(q_nope, q_rope, keys, ctx)
        return self.out(y.transpose(1, 2).reshape(num_rows, num_tokens, -1), loop_idx)

    def attend_expanded(
        self,
        q_nope: Float[Tensor, "B T H N"],
        q_rope: Float[Tensor, "B T H R"],
        keys: Float[Tensor, "B 1 S _"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B H T W"]:
        """Keys and values of every head rebuilt from the latents."""
        part = self.config
        latent, k_rope = keys.split((part.kv_lora_rank, part.qk_rope_head_dim), dim=-1)
        expanded = self.kv_up(latent[:, 0]).unflatten(-1, (part.num_heads, -1)).transpose(1, 2)
        k_nope, v = expanded.split((part.qk_nope_head_dim, part.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, part.num_heads, -1, -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        return attention(q, k, v, ctx.mask, self.scale)

    def attend_latents(
        self,
        q_nope: Float[Tensor, "B 1 H N"],
        q_rope: Float[Tensor, "B 1 H R"],
        keys: Float[Tensor, "B 1 S _"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B H 1 W"]:
        """Multi-query attention on the latents: q W_uk stands for q, W_uv is applied afterwards."""
        part = self.config
        heads = self.kv_up.weight.view(part.num_heads, -1, part.kv_lora_rank)
        w_key, w_value = heads.split((part.qk_nope_head_dim, part.v_head_dim), dim=1)
        q_latent = torch.bmm(q_nope[:, 0].transpose(0, 1), w_key).transpose(0, 1)
        q = torch.cat((q_latent, q_rope[:, 0]), dim=-1)[:, :, None]
        y = attention(q, keys, keys, ctx.mask, self.scale)[..., : part.kv_lora_rank]
        return torch.bmm(y[:, :, 0].transpose(0, 1), w_value.mT).transpose(0, 1)[:, :, None]


ATTENTIONS: dict[type, type[Attention]] = {GQAConfig: GQA, MLAConfig: MLA}


def make_attention(config: ModelConfig, stage: Stage, layer: int, global_layer: int) -> Attention:
    """The attention of one layer; ``global_layer`` counts prelude, core, coda through."""
    part = config.attention
    return ATTENTIONS[type(part)](config, part, stage, layer, global_layer)
