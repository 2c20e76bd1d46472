"""How one loop differs from the next. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.schema import require_positive


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


class LoopAdapterMember:
    """What a loop adapter says of itself."""

    @property
    def core_lora(self) -> "WeightLoRAConfig | None":
        """The low-rank change of the core's linear layers."""
        return None


@dataclass(frozen=True, kw_only=True)
class WeightLoRAConfig(LoopAdapterMember):
    """W_t = W + B_t A_t on the core's linear layers; loops past the table use its last row.

    Not on routed experts, the router and MLA's ``kv_up``, whose products loops and tokens share.

    Source: Relaxed Recursive Transformers (arXiv 2410.20672), section 3.
    """

    kind: ClassVar[str] = "weight_lora"
    rank: int
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "rank", "num_loops")

    @property
    def core_lora(self) -> "WeightLoRAConfig":
        """See ``LoopAdapterMember.core_lora``."""
        return self


@dataclass(frozen=True, kw_only=True)
class OutputLoRAConfig(LoopAdapterMember):
    """y += ((y down) * scale_t) up on the core's output: the original OpenMythos."""

    kind: ClassVar[str] = "output_lora"
    rank: int
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "rank", "num_loops")


LoopEmbeddingConfig = SinusoidalLoopConfig | LearnedLoopConfig


LoopAdapterConfig = WeightLoRAConfig | OutputLoRAConfig
