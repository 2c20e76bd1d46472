"""The configurations of the model's seams: one small frozen dataclass a member. No torch.

Every seam (attention, injection, halting ...) is a tagged union; a new idea is a new member.
"""

import typing
from dataclasses import dataclass
from typing import ClassVar, Literal


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise the ``ValueError`` that every bad field raises: name, value, what is allowed."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def require_positive(owner: object, *names: str) -> None:
    """Check that the named integer fields of ``owner`` are at least 1."""
    for name in names:
        require(getattr(owner, name) >= 1, name, getattr(owner, name), "at least 1")


def require_literals(owner: object) -> None:
    """Check the ``Literal`` fields of ``owner``: a misspelt word must not choose a branch."""
    for name, hint in typing.get_type_hints(type(owner)).items():
        if typing.get_origin(hint) is Literal:
            words = typing.get_args(hint)
            value = getattr(owner, name)
            require(value in words, name, value, "one of " + ", ".join(map(repr, words)))


# --- attention: what is cached -------------------------------------------------------------------


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
class Llama3ScalingConfig:
    """Slow rotations are slowed further by ``factor``, so that longer texts fit (Llama 3.1).

    Channels that turn less than ``low_freq_factor`` times in ``original_max_seq_len`` tokens are
    slowed, those above ``high_freq_factor`` keep their pace, those between are interpolated.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        require_positive(self, "factor", "original_max_seq_len")
        name, low, high = "rope.scaling.high_freq_factor", self.low_freq_factor, "above the low one"
        require(self.high_freq_factor > low > 0, name, self.high_freq_factor, f"{high}, {low}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions. ``interleaved`` pairs channels (2j, 2j+1), otherwise (j, j + half)."""

    theta: float = 10_000.0
    interleaved: bool = False
    scaling: Llama3ScalingConfig | None = None

    def __post_init__(self) -> None:
        require(self.theta > 1, "rope.theta", self.theta, "above 1")


# --- feed-forward: dense or sparse ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig:
    """down(SiLU(gate x) * up x) with inner width ``d_ff``."""

    kind: ClassVar[str] = "swiglu"
    d_ff: int

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")


@dataclass(frozen=True, kw_only=True)
class ReLUSquaredConfig:
    """down(scale * relu(up x)^2); Parcae's scale is 0.5."""

    kind: ClassVar[str] = "relu_squared"
    d_ff: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed and shared SwiGLU experts with DeepSeek-V3's bias balancing.

    ``bias_loops`` is the number of loops with a balancing bias of their own; deeper ones use the
    last.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """

    kind: ClassVar[str] = "moe"
    num_experts: int
    num_experts_per_token: int
    d_expert: int
    num_shared_experts: int = 1
    d_shared: int | None = None
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    routed_scale: float = 1.0
    bias_loops: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "d_expert", "num_experts_per_token", "bias_loops")
        require_literals(self)
        fits = self.num_experts_per_token <= self.num_experts
        name, allowed = "num_experts_per_token", f"at most num_experts={self.num_experts}"
        require(fits, name, self.num_experts_per_token, allowed)
        require(self.num_shared_experts >= 0, "num_shared_experts", self.num_shared_experts, ">= 0")
        require(self.shared_width >= 1, "d_shared", self.d_shared, "at least 1, or null")

    @property
    def shared_width(self) -> int:
        """Inner width of one shared expert."""
        return self.d_expert if self.d_shared is None else self.d_shared


# --- injection: how e re-enters at every loop ----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LTIInjectionConfig:
    """x = A h + Delta B e, h' = core(x); diagonal A with rho(A) < 1 by construction (Parcae)."""

    kind: ClassVar[str] = "lti"
    decay_init: float = 0.2**0.5

    def __post_init__(self) -> None:
        require(0 < self.decay_init < 1, "injection.decay_init", self.decay_init, "in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class OriginalLTIInjectionConfig:
    """x = norm(h + e), h' = A h + B e + core(x): the original OpenMythos, B not discretised."""

    kind: ClassVar[str] = "original_lti"


@dataclass(frozen=True, kw_only=True)
class LinearInjectionConfig:
    """x = W [h; e], h' = core(x) (Huginn); starts as the identity on h plus e."""

    kind: ClassVar[str] = "linear"


@dataclass(frozen=True, kw_only=True)
class AddInjectionConfig:
    """x = h + e, h' = core(x)."""

    kind: ClassVar[str] = "add"


@dataclass(frozen=True, kw_only=True)
class NoInjectionConfig:
    """x = h, h' = core(x): e enters only through the initial state (Ouro)."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class GateInjectionConfig:
    """y = core(h + e), z = sigmoid(W [y; h] + bias), h' = z y + (1 - z) h.

    Without ``add_e``, y = core(h): in Chen's model a loop adds a signal of its own (a ``learned``
    loop embedding), and the tokens enter through h_0 alone.

    Source: Chen 2026 (arXiv 2603.21676).
    """

    kind: ClassVar[str] = "gate"
    bias_init: float = -2.0
    add_e: bool = True


# --- state init, depth conditioning, halting -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ZerosInitConfig:
    """h_0 = 0."""

    kind: ClassVar[str] = "zeros"


@dataclass(frozen=True, kw_only=True)
class CopyInitConfig:
    """h_0 = e."""

    kind: ClassVar[str] = "copy"


@dataclass(frozen=True, kw_only=True)
class NormalInitConfig:
    """h_0 ~ truncated normal (3 sigma), a function of (seed, position, channel)."""

    kind: ClassVar[str] = "normal"
    std: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SinusoidalLoopConfig:
    """A sinusoid of the loop index on the first ``num_channels`` channels of the core's input.

    ``positions`` adds that of the token's position as well, at every loop: the two-dimensional
    signal of the Universal Transformer, which has no rotary positions.
    """

    kind: ClassVar[str] = "sinusoidal"
    num_channels: int
    theta: float = 10_000.0
    positions: bool = False


@dataclass(frozen=True, kw_only=True)
class LearnedLoopConfig:
    """A learned vector a loop; loops past the table use its last row."""

    kind: ClassVar[str] = "learned"
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "num_loops")


@dataclass(frozen=True, kw_only=True)
class WeightLoRAConfig:
    """W_t = W + B_t A_t on the core's linear layers; loops past the table use its last row.

    Not on routed experts, the router and MLA's ``kv_up``, whose products loops and tokens share.

    Source: Relaxed Recursive Transformers (arXiv 2410.20672), section 3.
    """

    kind: ClassVar[str] = "weight_lora"
    rank: int
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "rank", "num_loops")


@dataclass(frozen=True, kw_only=True)
class OutputLoRAConfig:
    """y += ((y down) * scale_t) up on the core's output: the original OpenMythos."""

    kind: ClassVar[str] = "output_lora"
    rank: int
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "rank", "num_loops")


@dataclass(frozen=True, kw_only=True)
class ACTConfig:
    """Adaptive computation time: the readout is a weighted sum of states (Graves 2016).

    ``keep_remainder`` False loses the mass that is left when the loops end, as the original
    OpenMythos does; it exists to load such checkpoints.
    """

    kind: ClassVar[str] = "act"
    threshold: float = 0.99
    bias_init: float = -3.0
    keep_remainder: bool = True

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "halting.threshold", self.threshold, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class UniversalACTConfig(ACTConfig):
    """The Universal Transformer's ACT: the head reads the state that a loop starts from.

    ``basic`` readouts are new w + old (1 - w), so later loops push earlier ones out and a rest of
    the zero vector stays; ``accumulated`` ones are Graves' sum. ``keep_remainder`` False is the
    published code, where a token that has not halted when the loops end keeps the mass it has.

    Source: tensor2tensor, universal_transformer_util.py, act_type "basic" and "accumulated".
    """

    kind: ClassVar[str] = "universal_act"
    bias_init: float = 1.0
    readout: Literal["basic", "accumulated"] = "basic"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_literals(self)


@dataclass(frozen=True, kw_only=True)
class PonderNetConfig:
    """Exit probabilities lambda_n prod(1 - lambda_j); the loss is weighted, not the state."""

    kind: ClassVar[str] = "pondernet"
    bias_init: float = -2.0


@dataclass(frozen=True, kw_only=True)
class ExitGateConfig:
    """Ouro's gate: PonderNet's distribution, trained with an entropy term."""

    kind: ClassVar[str] = "exit_gate"
    bias_init: float = 0.0


AttentionConfig = GQAConfig | MLAConfig
DenseConfig = SwiGLUConfig | ReLUSquaredConfig
FeedForwardConfig = SwiGLUConfig | ReLUSquaredConfig | MoEConfig
InjectionConfig = (
    LTIInjectionConfig
    | OriginalLTIInjectionConfig
    | LinearInjectionConfig
    | AddInjectionConfig
    | NoInjectionConfig
    | GateInjectionConfig
)
StateInitConfig = ZerosInitConfig | CopyInitConfig | NormalInitConfig
LoopEmbeddingConfig = SinusoidalLoopConfig | LearnedLoopConfig
LoopAdapterConfig = WeightLoRAConfig | OutputLoRAConfig
HaltingConfig = ACTConfig | UniversalACTConfig | PonderNetConfig | ExitGateConfig
