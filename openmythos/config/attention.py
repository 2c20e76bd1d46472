"""Attention: which keys and values a layer makes and caches. No torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from openmythos.config.schema import require, require_literals, require_positive


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention: keys and values of ``num_kv_heads`` heads are cached.

    ``qk_norm_eps`` None is the block's ``norm_eps``.
    """

    kind: ClassVar[str] = "gqa"
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


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
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


@dataclass(frozen=True, kw_only=True)
class ValueEmbeddingConfig:
    """Token tables added to the attention values of some layers, gated per kv head (Parcae).

    ``layers`` are global layer numbers: prelude, then core (each counted once), then coda.
    """

    layers: tuple[int, ...]
    gate_channels: int = 32


@dataclass(frozen=True, kw_only=True)
class DepthAttentionConfig:
    """Attention of the core over the token's own last loops, beside the sequence: MoDA, Dreamer.

    Keys and values are those that the same layer made for the token at its last
    ``num_recent_loops`` loops; num_loops - 1 of them are all. Nothing is added to the weights.
    """

    num_recent_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "num_recent_loops")


AttentionConfig = GQAConfig | MLAConfig
