"""Attention: which keys and values a layer makes and caches. No torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from openmythos.config.loop_signal import WeightLoRAConfig, loop_linear
from openmythos.config.member import Member, Whole
from openmythos.config.schema import require, require_literals, require_positive
from openmythos.config.weights import Weights, matrix, table, vector


class AttentionMember(Member):
    """What an attention says of itself."""

    # Keys and values of heads are cached, in this order and as they are attended to; value
    # embeddings and depth attention need them.
    has_kv_heads: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class GQAConfig(AttentionMember):
    """Grouped-query attention: keys and values of ``num_kv_heads`` heads are cached.

    ``qk_norm_eps`` None is the block's ``norm_eps``.
    """

    kind: ClassVar[str] = "gqa"
    has_kv_heads: ClassVar[bool] = True
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: Literal["none", "weightless", "weighted"] = "none"
    qk_norm_eps: float | None = None
    qk_bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "num_kv_heads", "head_dim")
        require_literals(self)
        divides = self.num_heads % self.num_kv_heads == 0
        allowed = f"a divisor of num_heads={self.num_heads}"
        require(divides, "attention.num_kv_heads", self.num_kv_heads, allowed)
        eps = self.qk_norm_eps
        require(eps is None or eps > 0, "attention.qk_norm_eps", eps, "above 0, or null")

    @property
    def rope_dim(self) -> int:
        """Channels of a head that carry the rotary position."""
        return self.head_dim

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, channels) of each tensor cached for one token and layer."""
        return ((self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim))

    def weights(self, d_model: int, lora: WeightLoRAConfig | None) -> Weights:
        """Those of one layer, norms of queries and keys included."""
        num_qk_heads = self.num_heads + self.num_kv_heads
        result = loop_linear(d_model, (num_qk_heads + self.num_kv_heads) * self.head_dim, lora)
        result += loop_linear(self.num_heads * self.head_dim, d_model, lora)
        if self.qk_bias:
            result += vector(num_qk_heads * self.head_dim)
        if self.qk_norm == "weighted":
            result += vector(2 * self.head_dim)
        return result

    def macs_per_key(self, *, cached: bool) -> int:
        """Multiply-adds of one query's score and value with one key."""
        return self.num_heads * 2 * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MLAConfig(AttentionMember):
    """Multi-head latent attention: one latent and one rotary key are cached.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    kind: ClassVar[str] = "mla"
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        names = ["num_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"]
        require_positive(self, *names, "qk_rope_head_dim", "v_head_dim")

    @property
    def rope_dim(self) -> int:
        """Channels of a head that carry the rotary position."""
        return self.qk_rope_head_dim

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, channels) of each tensor cached for one token and layer."""
        return ((1, self.kv_lora_rank + self.qk_rope_head_dim),)

    def weights(self, d_model: int, lora: WeightLoRAConfig | None) -> Weights:
        """Those of one layer, norms of the latents included."""
        heads, latent, rope_dim = self.num_heads, self.kv_lora_rank, self.qk_rope_head_dim
        return (
            loop_linear(d_model, self.q_lora_rank + latent + rope_dim, lora)
            + vector(self.q_lora_rank + latent)
            + loop_linear(self.q_lora_rank, heads * (self.qk_nope_head_dim + rope_dim), lora)
            # Whether it expands the latents or is absorbed, it costs the same per token.
            + matrix(latent, heads * (self.qk_nope_head_dim + self.v_head_dim))
            + loop_linear(heads * self.v_head_dim, d_model, lora)
        )

    def macs_per_key(self, *, cached: bool) -> int:
        """Multiply-adds of one query's score and value with one key; cached, with one latent."""
        if cached:
            # The cached rows serve as keys and, whole, as values: a slice would have to be copied.
            return 2 * self.num_heads * (self.kv_lora_rank + self.qk_rope_head_dim)
        key_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.num_heads * (key_dim + self.v_head_dim)


@dataclass(frozen=True, kw_only=True)
class ValueEmbeddingConfig(Member):
    """Token tables added to the attention values of some layers, gated per kv head (Parcae).

    ``layers`` are global layer numbers: prelude, then core (each counted once), then coda.
    """

    layers: tuple[int, ...]
    gate_channels: int = 32

    def check(self, model: Whole) -> None:
        """See ``Member.check``."""
        _require_kv_heads(model, "here")
        for layer in self.layers:
            inside = 0 <= layer < model.num_layers
            require(inside, "value_embedding.layers", layer, f"in 0..{model.num_layers - 1}")
        fits = 1 <= self.gate_channels <= model.d_model
        name, allowed = "value_embedding.gate_channels", f"in 1..{model.d_model}"
        require(fits, name, self.gate_channels, allowed)

    def weights(self, vocab_size: int, num_kv_heads: int, head_dim: int) -> Weights:
        """Those of one layer."""
        return table(vocab_size, num_kv_heads * head_dim) + matrix(self.gate_channels, num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class DepthAttentionConfig(Member):
    """Attention of the core over the token's own last loops, beside the sequence: MoDA, Dreamer.

    Keys and values are those that the same layer made for the token at its last
    ``num_recent_loops`` loops; num_loops - 1 of them are all. Nothing is added to the weights.
    """

    num_recent_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "num_recent_loops")

    def check(self, model: Whole) -> None:
        """See ``Member.check``."""
        _require_kv_heads(model, "with depth_attention")


AttentionConfig = GQAConfig | MLAConfig


def _require_kv_heads(model: Whole, where: str) -> None:
    kinds = [repr(member.kind) for member in get_args(AttentionConfig) if member.has_kv_heads]
    part, allowed = model.attention, f"{' or '.join(kinds)} {where}"
    require(part.has_kv_heads, "attention.kind", part.kind, allowed)
