"""How one loop differs from the next. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.member import Member, Whole
from openmythos.config.schema import require, require_positive
from openmythos.config.weights import Weights, matrix, table


class LoopEmbeddingMember(Member):
    """What a loop embedding says of itself."""

    def weights(self, d_model: int) -> Weights:
        """What is applied at every loop."""
        return Weights()


@dataclass(frozen=True, kw_only=True)
class SinusoidalLoopConfig(LoopEmbeddingMember):
    """A sinusoid of the loop index on the first ``num_channels`` channels of the core's input.

    ``positions`` adds that of the token's position as well, at every loop: the two-dimensional
    signal of the Universal Transformer, which has no rotary positions.
    """

    kind: ClassVar[str] = "sinusoidal"
    num_channels: int
    theta: float = 10_000.0
    positions: bool = False

    def check(self, model: Whole) -> None:
        """See ``Member.check``."""
        fits, allowed = 1 <= self.num_channels <= model.d_model, f"in 1..{model.d_model}"
        require(fits, "loop_embedding.num_channels", self.num_channels, allowed)


@dataclass(frozen=True, kw_only=True)
class LearnedLoopConfig(LoopEmbeddingMember):
    """A learned vector a loop; loops past the table use its last row."""

    kind: ClassVar[str] = "learned"
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "num_loops")

    def weights(self, d_model: int) -> Weights:
        """The vectors."""
        return table(self.num_loops, d_model)


class LoopAdapterMember(Member):
    """What a loop adapter says of itself."""

    def weights(self, d_model: int) -> Weights:
        """What is applied to the core's output at every loop."""
        return Weights()

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

    def weights(self, d_model: int) -> Weights:
        """Down, up and the scales."""
        return matrix(d_model, self.rank) * 2 + table(self.num_loops, self.rank)


LoopEmbeddingConfig = SinusoidalLoopConfig | LearnedLoopConfig

LoopAdapterConfig = WeightLoRAConfig | OutputLoRAConfig


def loop_linear(num_in: int, num_out: int, lora: WeightLoRAConfig | None) -> Weights:
    """A linear layer without bias, and what each loop adds to its weights."""
    plain = matrix(num_in, num_out)
    if lora is None:
        return plain
    row = lora.rank * (num_in + num_out)
    return plain + Weights(lora.num_loops * row, row, row)
