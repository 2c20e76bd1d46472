"""Grouped-query and multi-head latent attention; the KV cache is reached through the context."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config import AttentionConfig, GQAConfig, MLAConfig, ModelConfig
from openmythos.model.cache import Place, Stage
from openmythos.model.context import ForwardContext
from openmythos.model.loop_signal import LoopLinear
from openmythos.model.norm import RMSNorm
from openmythos.model.rope import apply_rope
from openmythos.ops.norm import rms_norm


class Attention(nn.Module):
    """What all kinds of attention share: their place in the model and RoPE.

    ``layer`` is the number within the stage. ``global_layer`` counts the layers of prelude, core
    and coda together.
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
        """Set the output projection to zero, so that the branch starts by adding nothing."""
        self.out.weight.zero_()

    def rotate(self, x: Float[Tensor, "B T N K"], ctx: ForwardContext) -> Tensor:
        """Apply RoPE with the context's angles to heads of width K."""
        if ctx.rope is None:
            return x
        return apply_rope(x, ctx.rope, interleaved=self.interleaved)

    def place(self, loop_idx: Int[Tensor, "B"] | None) -> Place:
        """This layer and the rows' loops, as the cache addresses keys and values."""
        return Place(self.stage, self.layer, loop_idx)


class GQA(Attention):
    """Grouped-query attention, optionally with QK-norm, QK-bias or value embeddings.

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
        self.group_size = num_heads // num_kv_heads
        width = (num_heads + 2 * num_kv_heads) * head_dim
        self.qkv = LoopLinear(config.d_model, width, self.lora)
        self.out = LoopLinear(num_heads * head_dim, config.d_model, self.lora)
        if part.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(num_heads + num_kv_heads, head_dim))
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
        num_kv_heads = heads.shape[2] // (self.group_size + 2)  # a process may hold some of them
        num_heads = num_kv_heads * self.group_size
        qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
        qk = self._position(qk, ctx).transpose(1, 2)
        q, k = qk.split((num_heads, num_kv_heads), dim=1)
        v = self._add_value_embedding(v, x, ctx).transpose(1, 2)
        place = self.place(loop_idx)
        kv = ctx.store((k, v), place)
        own = ctx.earlier(place, self.num_recent_loops) if self.num_recent_loops else None
        y = kv.attend(q, part.head_dim**-0.5, own=own)
        return self.out(y.transpose(1, 2).reshape(num_rows, num_tokens, -1), loop_idx)

    def _position(self, qk: Float[Tensor, "B T N K"], ctx: ForwardContext) -> Tensor:
        """Bias, norm and RoPE, in this order, for the heads of queries and keys together."""
        part = self.config
        if part.qk_bias:
            qk = qk + self.qk_bias.to(qk.dtype)
        if part.qk_norm != "none":
            qk = rms_norm(qk, self.norm_eps)  # without its weight, it commutes with RoPE
        if part.qk_norm == "weighted":
            num_kv_heads = qk.shape[2] // (self.group_size + 1)
            q_weight = self.q_norm_weight.expand(qk.shape[2] - num_kv_heads, -1)
            k_weight = self.k_norm_weight.expand(num_kv_heads, -1)
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
    """Multi-head latent attention; one latent and one rotary key per token are cached.

    A single token is decoded with the cached latents themselves: the up-projection is absorbed into
    the query and the output, so that the cached latents need not be expanded to keys and values.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
    """

    def __init__(
        self, config: ModelConfig, part: MLAConfig, stage: Stage, layer: int, global_layer: int
    ) -> None:
        super().__init__(config, part, stage, layer, global_layer)
        self.config = part
        eps, rope_dim, latent = config.block.norm_eps, part.qk_rope_head_dim, part.kv_lora_rank
        self.head_dim = part.qk_nope_head_dim + rope_dim
        self.scale = self.head_dim**-0.5
        self.down = LoopLinear(config.d_model, part.q_lora_rank + latent + rope_dim, self.lora)
        self.q_norm = RMSNorm(part.q_lora_rank, eps)
        self.kv_norm = RMSNorm(latent, eps)
        self.q_up = LoopLinear(part.q_lora_rank, part.num_heads * self.head_dim, self.lora)
        self.kv_up = LatentExpansion(part)
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
        q = self.q_up(self.q_norm(q_latent), loop_idx)
        q = q.view(num_rows, num_tokens, -1, self.head_dim)
        q_nope, q_rope = q.split((part.qk_nope_head_dim, part.qk_rope_head_dim), dim=-1)
        rotated = self.rotate(torch.cat((q_rope, k_rope[:, :, None]), dim=2), ctx)
        q_rope, k_rope = rotated.split((q.shape[2], 1), dim=2)
        latents = torch.cat((self.kv_norm(latent)[:, :, None], k_rope), dim=-1).transpose(1, 2)
        kv = ctx.store((latents,), self.place(loop_idx))
        if self.absorbs(num_tokens, ctx):
            q_latent = self.kv_up(queries=q_nope)
            q = torch.cat((q_latent, q_rope), dim=-1).transpose(1, 2)
            mixed = kv.attend(q, self.scale, v_dim=part.kv_lora_rank)
            y = self.kv_up(mixed=mixed.transpose(1, 2))
        else:
            q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
            k, v = self.kv_up(*kv.read())
            y = ctx.attend(q, k, v, self.scale).transpose(1, 2)
        return self.out(y.reshape(num_rows, num_tokens, -1), loop_idx)

    def absorbs(self, num_tokens: int, ctx: ForwardContext) -> bool:
        """Whether to attend to the latents: for a single token with a KV cache this costs less."""
        return num_tokens == 1 and ctx.cache is not None


class LatentExpansion(nn.Linear):
    """MLA's up-projection: expands latents to keys and values, or is absorbed by query and output.

    It has no LoRA: latents cached at any loop are expanded with the same weights.

    Source: DeepSeek-V2 (arXiv 2405.04434), appendix C.
    """

    def __init__(self, part: MLAConfig) -> None:
        widths = (part.qk_nope_head_dim, part.v_head_dim)
        super().__init__(part.kv_lora_rank, part.num_heads * sum(widths), bias=False)
        self.num_heads, self.widths = part.num_heads, widths

    def forward(
        self,
        latents: Float[Tensor, "B 1 S _"] | None = None,
        *,
        queries: Float[Tensor, "B 1 H N"] | None = None,
        mixed: Float[Tensor, "B 1 H C"] | None = None,
    ) -> Any:
        """Apply the projection to the one argument that is given.

        Args:
            latents: Latents, each followed by its rotary key, which all heads share; returns every
                head's keys ``[B H S K]`` and values ``[B H S W]``.
            queries: Queries; returns ``q W_key``, queries for the latents, ``[B 1 H C]``.
            mixed: Latents averaged by attention; returns the heads' outputs ``[B 1 H W]``.
        """
        if latents is not None:
            latent, k_rope = latents.tensor_split((self.in_features,), dim=-1)
            heads = super().forward(latent[:, 0]).unflatten(-1, (-1, sum(self.widths)))
            k_nope, v = heads.transpose(1, 2).split(self.widths, dim=-1)
            return torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1), v
        w_key, w_value = self.weight.view(self.num_heads, -1, self.in_features).split(
            self.widths, dim=1
        )
        if queries is not None:
            return torch.bmm(queries[:, 0].transpose(0, 1), w_key).transpose(0, 1)[:, None]
        assert mixed is not None
        return torch.bmm(mixed[:, 0].transpose(0, 1), w_value.mT).transpose(0, 1)[:, None]


ATTENTIONS: dict[type, type[Attention]] = {GQAConfig: GQA, MLAConfig: MLA}


def make_attention(config: ModelConfig, stage: Stage, layer: int, global_layer: int) -> Attention:
    """The attention of one layer; see ``Attention`` for its arguments."""
    part = config.attention
    return ATTENTIONS[type(part)](config, part, stage, layer, global_layer)
