"""Attention: the keys and values that a layer computes and caches. No torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from openmythos.config.loop_signal import WeightLoRAConfig, loop_linear, loop_linear_shapes
from openmythos.config.member import Member, Whole
from openmythos.config.schema import require, require_literals, require_positive
from openmythos.config.weights import Shapes, Weights, matrix, table, vector, within


class AttentionMember(Member):
    """What every attention config states beside its fields."""

    # Whether the cache holds one tensor of keys and one of values per kv head, as they are attended
    # to. Value embeddings and depth attention need this.
    has_kv_heads: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class GQAConfig(AttentionMember):
    """Grouped-query attention: keys and values of ``num_kv_heads`` heads are cached.

    Attributes:
        num_heads: Heads of the queries.
        num_kv_heads: Heads of keys and values; a divisor of ``num_heads``.
        head_dim: Channels of one head; even where there are rotary positions.
        qk_norm: RMSNorm of each head's queries and keys: none, without a weight, or with one.
        qk_norm_eps: Added under that norm's root; null: the block's ``norm_eps``.
        qk_bias: Whether queries and keys have a learned bias.
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
        """The weights of one layer, including the norms of queries and keys."""
        num_qk_heads = self.num_heads + self.num_kv_heads
        result = loop_linear(d_model, (num_qk_heads + self.num_kv_heads) * self.head_dim, lora)
        result += loop_linear(self.num_heads * self.head_dim, d_model, lora)
        if self.qk_bias:
            result += vector(num_qk_heads * self.head_dim)
        if self.qk_norm == "weighted":
            result += vector(2 * self.head_dim)
        return result

    def shapes(self, d_model: int, lora: WeightLoRAConfig | None) -> Shapes:
        """The parameters of one layer, including the norms of queries and keys."""
        inner, num_qk_heads = self.num_heads * self.head_dim, self.num_heads + self.num_kv_heads
        width = inner + 2 * self.num_kv_heads * self.head_dim
        shapes = within("qkv", loop_linear_shapes(d_model, width, lora))
        shapes |= within("out", loop_linear_shapes(inner, d_model, lora))
        if self.qk_bias:
            shapes["qk_bias"] = (num_qk_heads, self.head_dim)
        if self.qk_norm == "weighted":
            shapes |= {"q_norm_weight": (self.head_dim,), "k_norm_weight": (self.head_dim,)}
        return shapes

    def kept_bytes(self, tp: int = 1) -> int:
        """Bytes that a layer keeps per token for its backward pass, uncompiled, in bfloat16.

        ``tp`` ranks divide the layer.
        """
        heads, kv_heads = self.num_heads // tp, self.num_kv_heads // tp
        # Queries and keys with their positions, the fused projection (for the values), the output.
        kept = 2 * self.head_dim * (3 * heads + 3 * kv_heads) + 4 * heads
        if self.qk_norm != "none":
            kept += (4 if self.qk_norm == "weightless" else 6) * self.head_dim * (heads + kv_heads)
        return kept

    def macs_per_key(self, *, cached: bool) -> int:
        """Multiply-adds for one query and one key, in the score and in the weighted sum."""
        return self.num_heads * 2 * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MLAConfig(AttentionMember):
    """Multi-head latent attention: one latent and one rotary key per token are cached.

    Attributes:
        num_heads: Heads of the queries.
        q_lora_rank: Channels of the latent that queries are made from.
        kv_lora_rank: Channels of the latent that keys and values are made from; it is what is
            cached.
        qk_nope_head_dim: Channels of a head's queries and keys without rotary positions.
        qk_rope_head_dim: Channels of a head's queries and keys with rotary positions; even.
        v_head_dim: Channels of a head's values.

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
        """The weights of one layer, including the norms of the latents."""
        heads, latent, rope_dim = self.num_heads, self.kv_lora_rank, self.qk_rope_head_dim
        return (
            loop_linear(d_model, self.q_lora_rank + latent + rope_dim, lora)
            + vector(self.q_lora_rank + latent)
            + loop_linear(self.q_lora_rank, heads * (self.qk_nope_head_dim + rope_dim), lora)
            # The up-projection costs the same per token whether it is absorbed or not.
            + matrix(latent, heads * (self.qk_nope_head_dim + self.v_head_dim))
            + loop_linear(heads * self.v_head_dim, d_model, lora)
        )

    def shapes(self, d_model: int, lora: WeightLoRAConfig | None) -> Shapes:
        """The parameters of one layer, including the norms of the latents."""
        heads, latent, rope_dim = self.num_heads, self.kv_lora_rank, self.qk_rope_head_dim
        widths = {
            "down": (d_model, self.q_lora_rank + latent + rope_dim),
            "q_up": (self.q_lora_rank, heads * (self.qk_nope_head_dim + rope_dim)),
            "out": (heads * self.v_head_dim, d_model),
        }
        shapes: Shapes = {
            "q_norm.weight": (self.q_lora_rank,),
            "kv_norm.weight": (latent,),
            "kv_up.weight": (heads * (self.qk_nope_head_dim + self.v_head_dim), latent),
        }
        for name, (num_in, num_out) in widths.items():
            shapes |= within(name, loop_linear_shapes(num_in, num_out, lora))
        return shapes

    def kept_bytes(self, tp: int = 1) -> int:
        """Bytes that a layer keeps per token for its backward pass, uncompiled, in bfloat16.

        ``tp`` ranks divide the layer.
        """
        heads, key_dim = self.num_heads // tp, self.qk_nope_head_dim + self.qk_rope_head_dim
        norms = 6 * (self.q_lora_rank + self.kv_lora_rank) + 8
        latents = 2 * (self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim)
        # Queries, keys, values and output of the keys' width, and the output of the values'.
        return norms + latents + heads * (8 * key_dim + 2 * self.v_head_dim + 4)

    def macs_per_key(self, *, cached: bool) -> int:
        """Multiply-adds for one query and one key; ``cached``: absorbed, for one cached latent."""
        if cached:
            # The cached latents with their rotary keys also serve as values, at full width: taking
            # only the latent channels would need a copy.
            return 2 * self.num_heads * (self.kv_lora_rank + self.qk_rope_head_dim)
        key_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.num_heads * (key_dim + self.v_head_dim)


@dataclass(frozen=True, kw_only=True)
class ValueEmbeddingConfig(Member):
    """Learned token embeddings added to the values of some attention layers (Parcae).

    Each kv head has a gate, computed from the first channels of the layer's input.

    Attributes:
        layers: The layers that have one, by number: prelude, then core (each counted once), then
            coda.
        gate_channels: Channels of the layer's input that the gate reads.
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
        """The weights of one layer's table and gate."""
        return table(vocab_size, num_kv_heads * head_dim) + matrix(self.gate_channels, num_kv_heads)

    def shapes(self, vocab_size: int, num_kv_heads: int, head_dim: int) -> Shapes:
        """The parameters of one layer's table and gate, which belong to its attention."""
        return {
            "value_table.weight": (vocab_size, num_kv_heads * head_dim),
            "value_gate.weight": (num_kv_heads, self.gate_channels),
        }


@dataclass(frozen=True, kw_only=True)
class DepthAttentionConfig(Member):
    """Attention in the core over the token's own earlier loops as well (MoDA, Dreamer).

    Besides the sequence, a token attends to the keys and values that the same layer computed for
    this token in its last loops. It adds no parameters.

    Attributes:
        num_recent_loops: How many of the token's last loops are attended to; num_loops - 1 covers
            all.
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
