"""Feed-forward layers: dense, or a mixture of experts. No torch."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from openmythos.config.schema import require, require_literals, require_positive


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig:
    """down(SiLU(gate x) * up x) with inner width ``d_ff``."""

    kind: ClassVar[str] = "swiglu"
    d_ff: int

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")

    def unlooped(self) -> "SwiGLUConfig":
        """Without what only a loop needs, which is nothing."""
        return self


@dataclass(frozen=True, kw_only=True)
class ReLUSquaredConfig:
    """down(scale * relu(up x)^2); Parcae's scale is 0.5."""

    kind: ClassVar[str] = "relu_squared"
    d_ff: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")

    def unlooped(self) -> "ReLUSquaredConfig":
        """Without what only a loop needs, which is nothing."""
        return self


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

    def unlooped(self) -> "MoEConfig":
        """Without what only a loop needs: with one balancing bias."""
        return replace(self, bias_loops=1)


DenseConfig = SwiGLUConfig | ReLUSquaredConfig


FeedForwardConfig = SwiGLUConfig | ReLUSquaredConfig | MoEConfig
