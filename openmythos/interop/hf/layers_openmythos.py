"""What the blocks of an OpenMythos export are made of; ``modeling_openmythos`` loops them.

``loop`` is the number of the current loop, counted from 0, or None outside the core.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_openmythos import OpenMythosConfig

Rope = tuple[Tensor, Tensor, bool] | None


class RMSNorm(nn.Module):
    """``weight * x / rms(x)``; statistics in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * weightless_norm(hidden_states, self.eps)


def weightless_norm(x: Tensor, eps: float) -> Tensor:
    """``x / rms(x)``."""
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def make_norm(config: OpenMythosConfig, wanted: bool = True) -> Any:
    """A norm of the stream, or None."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps) if wanted else None


def rotary_angles(config: OpenMythosConfig, position_ids: Tensor) -> Rope:
    """Cosine, signed sine, and whether pairs are neighbours; recomputed, so no cast spoils them."""
    if config.rope is None:
        return None
    dim = config.attention.get("qk_rope_head_dim") or config.head_dim
    double = torch.float32 if position_ids.device.type == "mps" else torch.float64
    exponents = torch.arange(0, dim, 2, dtype=double, device=position_ids.device) / dim
    frequencies = config.rope["theta"] ** -exponents
    if part := config.rope.get("scaling"):  # that of Llama 3.1
        turns = frequencies * part["original_max_seq_len"] / (2 * math.pi)
        low, high = part["low_freq_factor"], part["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = torch.lerp(frequencies / part["factor"], frequencies, kept)
    angles = position_ids[:, None, :, None].float() * frequencies.float()
    cos, sin = angles.cos(), angles.sin()
    if config.rope["interleaved"]:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2), True
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), False


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of channels of ``[batch, heads, tokens, channels]`` by its angle."""
    if rope is None:
        return x
    cos, sin, interleaved = rope
    wide = x.to(cos.dtype)
    swapped = wide.roll(wide.shape[-1] // 2, -1)
    if interleaved:
        swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)


class LoopLoRA(nn.Module):
    """What one loop adds to a projection: ``x down_t up_t``; past the table its last row."""

    def __init__(self, num_loops: int, rank: int, num_in: int, num_out: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(num_loops, rank, num_in))
        self.up = nn.Parameter(torch.empty(num_loops, num_out, rank))

    def reset(self, std: float) -> None:
        init.normal_(self.down, std=std)
        init.zeros_(self.up)

    def forward(self, hidden_states: Tensor, loop: int) -> Tensor:
        row = min(loop, len(self.down) - 1)
        return functional.linear(functional.linear(hidden_states, self.down[row]), self.up[row])


def make_lora(config: OpenMythosConfig, stage: str, num_in: int, num_out: int) -> Any:
    """The change a loop makes to a projection of the core, or None where there is none."""
    part = config.loop_adapter
    if stage != "core" or part is None or part["kind"] != "weight_lora":
        return None
    return LoopLoRA(part["num_loops"], part["rank"], num_in, num_out)


class Attention(nn.Module):
    """Grouped-query attention: the projections; the slot of the loop attends and caches."""

    def __init__(self, config: OpenMythosConfig, stage: str, layer: int) -> None:
        super().__init__()
        part, dim = config.attention, config.hidden_size
        eps = part.get("qk_norm_eps")
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps if eps is None else eps
        q, kv = (part[name] * self.head_dim for name in ("num_heads", "num_kv_heads"))
        self.q_proj = nn.Linear(dim, q, bias=part.get("qk_bias", False))
        self.k_proj = nn.Linear(dim, kv, bias=part.get("qk_bias", False))
        self.v_proj = nn.Linear(dim, kv, bias=False)
        self.o_proj = nn.Linear(q, dim, bias=False)
        self.qkv_lora = make_lora(config, stage, dim, q + 2 * kv)
        self.o_lora = make_lora(config, stage, q, dim)
        self.qk_norm = part["qk_norm"]
        if self.qk_norm == "weighted":
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, self.eps) for _ in range(2))
        self.value_table: nn.Embedding | None = None
        if config.value_embedding is not None and layer in config.value_embedding["layers"]:
            channels, heads = config.value_embedding["gate_channels"], part["num_kv_heads"]
            self.value_table = nn.Embedding(config.vocab_size, kv)
            self.value_gate = nn.Linear(channels, heads, bias=False)
            self.gate_channels = channels

    def forward(
        self,
        hidden_states: Tensor,
        slot: nn.Module,
        rope: Rope,
        attention_mask: Tensor | None,
        loop: int | None,
        input_ids: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self.q_proj(hidden_states)
        k = self.k_proj(hidden_states)
        v = self.v_proj(hidden_states)
        if self.qkv_lora is not None:
            change = self.qkv_lora(hidden_states, loop)
            widths = [projected.shape[-1] for projected in (q, k, v)]
            q, k, v = (a + b for a, b in zip((q, k, v), change.split(widths, -1), strict=True))
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        if self.qk_norm == "weightless":
            q, k = weightless_norm(q, self.eps), weightless_norm(k, self.eps)
        elif self.qk_norm == "weighted":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.value_table is not None:
            gate = 2 * torch.sigmoid(self.value_gate(hidden_states[..., : self.gate_channels]))
            v = v + gate[..., None] * self.value_table(input_ids).view(v.shape)
        q, k = rotate(q.transpose(1, 2), rope), rotate(k.transpose(1, 2), rope)
        y, _ = slot(q, k, v.transpose(1, 2), attention_mask, **kwargs)
        y = y.reshape(*hidden_states.shape[:2], -1)
        out = self.o_proj(y)
        return out if self.o_lora is None else out + self.o_lora(y, loop)


class LatentAttention(nn.Module):
    """Multi-head latent attention with keys and values expanded, as every engine can cache them."""

    def __init__(self, config: OpenMythosConfig, stage: str, layer: int) -> None:
        super().__init__()
        part, dim, heads = config.attention, config.hidden_size, config.attention["num_heads"]
        self.nope, self.rope, self.v_dim = (
            part[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        self.head_dim = config.head_dim
        self.q_rank, self.kv_rank = part["q_lora_rank"], part["kv_lora_rank"]
        down, q = self.q_rank + self.kv_rank + self.rope, heads * (self.nope + self.rope)
        self.qkv_down_proj = nn.Linear(dim, down, bias=False)
        # The tensor-parallel style "mla_kv_a_proj" looks here for the width of the rotary part.
        rotary: Any = SimpleNamespace(qk_rope_head_dim=self.rope)
        self.qkv_down_proj.config = rotary
        self.q_latent_norm = RMSNorm(self.q_rank, config.rms_norm_eps)
        self.kv_latent_norm = RMSNorm(self.kv_rank, config.rms_norm_eps)
        self.q_up_proj = nn.Linear(self.q_rank, q, bias=False)
        self.kv_up_proj = nn.Linear(self.kv_rank, heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_dim, dim, bias=False)
        self.qkv_down_lora = make_lora(config, stage, dim, down)
        self.q_up_lora = make_lora(config, stage, self.q_rank, q)
        self.o_lora = make_lora(config, stage, heads * self.v_dim, dim)

    def forward(
        self,
        hidden_states: Tensor,
        slot: nn.Module,
        rope: Rope,
        attention_mask: Tensor | None,
        loop: int | None,
        input_ids: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        shape = (*hidden_states.shape[:2], -1)
        down = self.qkv_down_proj(hidden_states)
        if self.qkv_down_lora is not None:
            down = down + self.qkv_down_lora(hidden_states, loop)
        q_latent, latent, k_rope = down.split((self.q_rank, self.kv_rank, self.rope), -1)
        q_latent = self.q_latent_norm(q_latent)
        q = self.q_up_proj(q_latent)
        if self.q_up_lora is not None:
            q = q + self.q_up_lora(q_latent, loop)
        q = q.view(*shape, self.nope + self.rope).transpose(1, 2)
        kv = self.kv_up_proj(self.kv_latent_norm(latent))
        kv = kv.view(*shape, self.nope + self.v_dim).transpose(1, 2)
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        k_nope, v = kv.split((self.nope, self.v_dim), -1)
        k_rope = rotate(k_rope[:, None], rope).expand(-1, k_nope.shape[1], -1, -1)
        q, k = torch.cat((q_nope, rotate(q_rope, rope)), -1), torch.cat((k_nope, k_rope), -1)
        # One width for all three: zeros change neither the scores nor the first channels.
        q, k, v = (functional.pad(x, (0, self.head_dim - x.shape[-1])) for x in (q, k, v))
        y, _ = slot(q, k, v, attention_mask, **kwargs)
        y = y.reshape(*shape, self.head_dim)[..., : self.v_dim].reshape(shape)
        out = self.o_proj(y)
        return out if self.o_lora is None else out + self.o_lora(y, loop)


class SwiGLU(nn.Module):
    """``down(SiLU(gate x) * up x)``, written so that engines can merge gate and up."""

    def __init__(self, config: OpenMythosConfig, stage: str, d_ff: int) -> None:
        super().__init__()
        dim = config.hidden_size
        self.gate_proj = nn.Linear(dim, d_ff, bias=False)
        self.up_proj = nn.Linear(dim, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, dim, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states: Tensor, loop: int | None = None) -> Tensor:
        return self.down_proj(
            self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        )


class LoopSwiGLU(SwiGLU):
    """``SwiGLU`` with what each loop adds to its projections."""

    def __init__(self, config: OpenMythosConfig, stage: str, d_ff: int) -> None:
        super().__init__(config, stage, d_ff)
        self.gate_up_lora = make_lora(config, stage, config.hidden_size, 2 * d_ff)
        self.down_lora = make_lora(config, stage, d_ff, config.hidden_size)

    def forward(self, hidden_states: Tensor, loop: int | None = None) -> Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        d_gate, d_up = self.gate_up_lora(hidden_states, loop).chunk(2, -1)
        hidden = self.act_fn(gate + d_gate) * (up + d_up)
        return self.down_proj(hidden) + self.down_lora(hidden, loop)


class ReLUSquared(nn.Module):
    """``down(scale * relu(up x)^2)``."""

    def __init__(self, config: OpenMythosConfig, stage: str, part: dict[str, Any]) -> None:
        super().__init__()
        dim, d_ff = config.hidden_size, part["d_ff"]
        self.up_proj = nn.Linear(dim, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, dim, bias=False)
        self.up_lora = make_lora(config, stage, dim, d_ff)
        self.down_lora = make_lora(config, stage, d_ff, dim)
        self.scale = part["scale"]

    def forward(self, hidden_states: Tensor, loop: int | None = None) -> Tensor:
        up = self.up_proj(hidden_states)
        if self.up_lora is not None:
            up = up + self.up_lora(hidden_states, loop)
        hidden = functional.relu(up).square() * self.scale
        out = self.down_proj(hidden)
        return out if self.down_lora is None else out + self.down_lora(hidden, loop)


class Router(nn.Module):
    """Experts by score + bias of the loop, weighted by the score alone; computed in fp32."""

    def __init__(self, config: OpenMythosConfig, part: dict[str, Any]) -> None:
        super().__init__()
        self.part = part
        self.selection_bias: Tensor
        self.weight = nn.Parameter(torch.empty(part["num_experts"], config.hidden_size))
        bias = torch.zeros(part["bias_loops"], part["num_experts"])
        self.register_buffer("selection_bias", bias)  # a row a loop; engines know no such bias

    def reset(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        init.zeros_(self.selection_bias)

    def forward(self, hidden_states: Tensor, loop: int | None) -> tuple[Tensor, Tensor, Tensor]:
        part, row = self.part, min(loop or 0, len(self.selection_bias) - 1)
        logits = functional.linear(hidden_states.float(), self.weight.float())
        sigmoid = part["scoring"] == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        selection = (scores if sigmoid else logits).detach() + self.selection_bias[row]
        experts = selection.topk(part["num_experts_per_token"]).indices
        weights = scores.gather(1, experts)
        total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        weights = part["routed_scale"] * weights / total
        return logits, weights.to(hidden_states.dtype), experts


@use_experts_implementation
class Experts(nn.Module):
    """The routed SwiGLU experts, one stack a matrix."""

    def __init__(self, config: OpenMythosConfig, part: dict[str, Any]) -> None:
        super().__init__()
        self.num_experts, dim, width = part["num_experts"], config.hidden_size, part["d_expert"]
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, dim, width))
        self.act_fn = ACT2FN["silu"]

    def reset(self, std: float) -> None:
        init.normal_(self.gate_up_proj, std=std)
        init.normal_(self.down_proj, std=std)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        # Expert parallelism writes ``num_experts`` where the expert is on another rank.
        for expert in top_k_index[top_k_index < self.num_experts].unique().tolist():
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            projected = functional.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, up = projected.chunk(2, -1)
            y = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, y * top_k_weights[token, choice, None])
        return out


class SparseMLP(nn.Module):
    """Routed experts plus shared experts, which are one wider expert."""

    def __init__(self, config: OpenMythosConfig, stage: str, part: dict[str, Any]) -> None:
        super().__init__()
        self.gate = Router(config, part)
        self.experts = Experts(config, part)
        width = part["d_expert"] if part["d_shared"] is None else part["d_shared"]
        shared = {"kind": "swiglu", "d_ff": part["num_shared_experts"] * width}
        self.shared_experts = make_mlp(config, stage, shared) if shared["d_ff"] else None

    def forward(self, hidden_states: Tensor, loop: int | None = None) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = self.gate(flat, loop)
        y = self.experts(flat, experts, weights).view(hidden_states.shape)
        return y if self.shared_experts is None else y + self.shared_experts(hidden_states, loop)


def make_mlp(config: OpenMythosConfig, stage: str, part: dict[str, Any]) -> nn.Module:
    """The feed-forward that ``part`` describes."""
    if part["kind"] == "moe":
        return SparseMLP(config, stage, part)
    if part["kind"] == "relu_squared":
        return ReLUSquared(config, stage, part)
    lora = make_lora(config, stage, 1, 1) is not None
    return (LoopSwiGLU if lora else SwiGLU)(config, stage, part["d_ff"])


class Block(GradientCheckpointingLayer):
    """Attention, then feed-forward, each on a residual branch."""

    def __init__(self, config: OpenMythosConfig, stage: str, layer: int) -> None:
        super().__init__()
        self.norm, scale = config.block["norm"], config.block["layer_scale"]
        attention = Attention if config.attention["kind"] == "gqa" else LatentAttention
        self.self_attn = attention(config, stage, layer)
        core = stage == "core" and config.core_feed_forward is not None
        self.mlp = make_mlp(
            config, stage, config.core_feed_forward if core else config.feed_forward
        )
        self.attention_norm, self.feed_forward_norm = make_norm(config), make_norm(config)
        outer = self.norm != "pre"
        self.attention_out_norm = make_norm(config, outer)
        self.feed_forward_out_norm = make_norm(config, outer)
        self.init_scale = scale
        vector = None if scale is None else torch.full((config.hidden_size,), float(scale))
        self.attention_scale = None if vector is None else nn.Parameter(vector.clone())
        self.feed_forward_scale = None if vector is None else nn.Parameter(vector)

    def reset(self, std: float) -> None:
        if self.init_scale is not None:
            init.constant_(self.attention_scale, self.init_scale)
            init.constant_(self.feed_forward_scale, self.init_scale)

    def forward(self, hidden_states: Tensor, loop: int | None, **kwargs: Any) -> Tensor:
        y = self.self_attn(self.attention_norm(hidden_states), loop=loop, **kwargs)
        y = y if self.attention_scale is None else y * self.attention_scale
        x = self._add(hidden_states, y, self.attention_out_norm)
        y = self.mlp(self.feed_forward_norm(x), loop)
        y = y if self.feed_forward_scale is None else y * self.feed_forward_scale
        return self._add(x, y, self.feed_forward_out_norm)

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return x + y
        return x + norm(y) if self.norm == "peri" else norm(x + y)
