"""What makes one loop differ from the next: loop embeddings and loop adapters. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.member import Member, Whole
from openmythos.config.schema import require, require_positive
from openmythos.config.weights import Shapes, Weights, matrix, table, within


class LoopEmbeddingMember(Member):
    """What every loop embedding states beside its fields."""

    def weights(self, d_model: int) -> Weights:
        """The weights that are applied at every loop."""
        return Weights()

    def shapes(self, d_model: int) -> Shapes:
        """Its parameters."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SinusoidalLoopConfig(LoopEmbeddingMember):
    """Sinusoids of the loop index, added to the first channels of the state.

    Attributes:
        num_channels: Channels that they are added to.
        theta: The longest wavelength over 2 pi, in loops.
        positions: Whether sinusoids of the token's position are added as well, at every loop, as in
            the Universal Transformer, which has no rotary positions.
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
    """One learned vector per loop, added to the state.

    Attributes:
        num_loops: Loops with a vector of their own; later loops use the last one.
    """

    kind: ClassVar[str] = "learned"
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "num_loops")

    def weights(self, d_model: int) -> Weights:
        """The weights of the vectors; one token and loop uses one of them."""
        return table(self.num_loops, d_model)

    def shapes(self, d_model: int) -> Shapes:
        """See ``LoopEmbeddingMember.shapes``."""
        return {"table": (self.num_loops, d_model)}


class LoopAdapterMember(Member):
    """What every loop adapter states beside its fields."""

    def weights(self, d_model: int) -> Weights:
        """The weights that are applied to the core's output at every loop."""
        return Weights()

    def shapes(self, d_model: int) -> Shapes:
        """The parameters that are applied to the core's output."""
        return {}

    @property
    def core_lora(self) -> "WeightLoRAConfig | None":
        """The LoRA of the core's linear layers, if there is one."""
        return None


@dataclass(frozen=True, kw_only=True)
class WeightLoRAConfig(LoopAdapterMember):
    """LoRA per loop t on the core's linear layers: W_t = W + B_t A_t.

    Routed experts, the router and MLA's ``kv_up`` have none, because rows at different loops share
    their products.

    Attributes:
        rank: Rank of each loop's change.
        num_loops: Loops with a change of their own; later loops use the last one.

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
    """y += ((y down) * scale_t) up on the core's output y at loop t (the original OpenMythos).

    Attributes:
        rank: Inner width of the projections.
        num_loops: Loops with a scale of their own; later loops use the last one.
    """

    kind: ClassVar[str] = "output_lora"
    rank: int
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "rank", "num_loops")

    def weights(self, d_model: int) -> Weights:
        """The weights of the projections down and up, and the scales."""
        return matrix(d_model, self.rank) * 2 + table(self.num_loops, self.rank)

    def shapes(self, d_model: int) -> Shapes:
        """See ``LoopAdapterMember.shapes``."""
        down, up = {"weight": (self.rank, d_model)}, {"weight": (d_model, self.rank)}
        scale = {"scale": (self.num_loops, self.rank)}
        return within("down", down) | within("up", up) | scale


@dataclass(frozen=True, kw_only=True)
class LoopScaleConfig(LoopAdapterMember):
    """LayerScale per loop: the core's output y times a vector of loop t, which starts at 1.

    Attributes:
        num_loops: Loops with a vector of their own; later loops use the last one.

    Source: Touvron et al. 2021 (arXiv 2103.17239), section 2, with one scale per loop.
    """

    kind: ClassVar[str] = "loop_scale"
    num_loops: int

    def __post_init__(self) -> None:
        require_positive(self, "num_loops")

    def weights(self, d_model: int) -> Weights:
        """One vector per loop, of which a token reads one."""
        return table(self.num_loops, d_model)

    def shapes(self, d_model: int) -> Shapes:
        """See ``LoopAdapterMember.shapes``."""
        return {"scale": (self.num_loops, d_model)}


LoopEmbeddingConfig = SinusoidalLoopConfig | LearnedLoopConfig

LoopAdapterConfig = WeightLoRAConfig | OutputLoRAConfig | LoopScaleConfig


def loop_linear(num_in: int, num_out: int, lora: WeightLoRAConfig | None) -> Weights:
    """The weights of a linear layer without bias, with those of the LoRA of every loop."""
    plain = matrix(num_in, num_out)
    if lora is None:
        return plain
    row = lora.rank * (num_in + num_out)
    return plain + Weights(lora.num_loops * row, row, row)


def loop_linear_shapes(num_in: int, num_out: int, lora: WeightLoRAConfig | None) -> Shapes:
    """The parameters that ``loop_linear`` counts."""
    shapes: Shapes = {"weight": (num_out, num_in)}
    if lora is not None:
        shapes["lora_down"] = (lora.num_loops, lora.rank, num_in)
        shapes["lora_up"] = (lora.num_loops, num_out, lora.rank)
    return shapes
