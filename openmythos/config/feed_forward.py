"""Feed-forward layers: dense, or a mixture of experts. No torch."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from openmythos.config.loop_signal import WeightLoRAConfig, loop_linear, loop_linear_shapes
from openmythos.config.member import Member
from openmythos.config.schema import require, require_literals, require_positive
from openmythos.config.weights import Shapes, Weights, matrix, within


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig(Member):
    """y = down(SiLU(gate x) * up x).

    Attributes:
        d_ff: The inner width.
    """

    kind: ClassVar[str] = "swiglu"
    d_ff: int

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")

    @property
    def width(self) -> int:
        """The inner width."""
        return self.d_ff

    def with_width(self, width: int) -> "SwiGLUConfig":
        """A copy with another inner width."""
        return replace(self, d_ff=width)

    def weights(self, d_model: int, lora: WeightLoRAConfig | None) -> dict[str, Weights]:
        """The weights of one layer, by part."""
        return {"feed_forward": _swiglu(d_model, self.d_ff, lora)}

    def shapes(self, d_model: int, lora: WeightLoRAConfig | None) -> Shapes:
        """The parameters of one layer."""
        return _swiglu_shapes(d_model, self.d_ff, lora)

    def kept_bytes(self, d_model: int, tp: int = 1, ep: int = 1) -> int:
        """Bytes that a layer keeps per token for its backward pass, uncompiled, in bfloat16.

        ``tp`` ranks divide the layer, ``ep`` ranks its experts.
        """
        return _swiglu_kept(self.d_ff // tp)

    def unlooped(self) -> "SwiGLUConfig":
        """The config for a model that runs once: the same."""
        return self


@dataclass(frozen=True, kw_only=True)
class ReLUSquaredConfig(Member):
    """y = down(scale * relu(up x)^2).

    Attributes:
        d_ff: The inner width.
        scale: Factor of the inner activations; Parcae's is 0.5.
    """

    kind: ClassVar[str] = "relu_squared"
    d_ff: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")

    @property
    def width(self) -> int:
        """The inner width."""
        return self.d_ff

    def with_width(self, width: int) -> "ReLUSquaredConfig":
        """A copy with another inner width."""
        return replace(self, d_ff=width)

    def weights(self, d_model: int, lora: WeightLoRAConfig | None) -> dict[str, Weights]:
        """The weights of one layer, by part."""
        up, down = loop_linear(d_model, self.d_ff, lora), loop_linear(self.d_ff, d_model, lora)
        return {"feed_forward": up + down}

    def shapes(self, d_model: int, lora: WeightLoRAConfig | None) -> Shapes:
        """The parameters of one layer."""
        up = loop_linear_shapes(d_model, self.d_ff, lora)
        return within("up", up) | within("down", loop_linear_shapes(self.d_ff, d_model, lora))

    def kept_bytes(self, d_model: int, tp: int = 1, ep: int = 1) -> int:
        """Bytes that a layer keeps per token for its backward pass, uncompiled, in bfloat16.

        ``tp`` ranks divide the layer, ``ep`` ranks its experts.
        """
        return 4 * (self.d_ff // tp)

    def unlooped(self) -> "ReLUSquaredConfig":
        """The config for a model that runs once: the same."""
        return self


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Member):
    """Mixture of experts: routed and shared SwiGLU experts, balanced by DeepSeek-V3's bias.

    Attributes:
        num_experts: Routed experts of a layer.
        num_experts_per_token: Routed experts that a token uses.
        d_expert: Inner width of a routed expert.
        num_shared_experts: Experts that every token uses besides.
        d_shared: Inner width of a shared expert; null: ``d_expert``.
        scoring: How the router's logits become scores.
        routed_scale: Factor of the routed experts' sum.
        bias_loops: Loops with a balancing bias of their own; later loops use the last one.

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

    @property
    def width(self) -> int:
        """Inner width of one routed expert."""
        return self.d_expert

    def with_width(self, width: int) -> "MoEConfig":
        """A copy with another inner width of its routed experts."""
        return replace(self, d_expert=width)

    def weights(self, d_model: int, lora: WeightLoRAConfig | None) -> dict[str, Weights]:
        """The weights of one layer, by part; active are the experts that one token is routed to."""
        expert = _swiglu(d_model, self.d_expert, None)
        read = expert * self.num_experts_per_token
        shared = self.num_shared_experts * self.shared_width
        return {
            "router": matrix(d_model, self.num_experts),
            "routed_experts": Weights(expert.params * self.num_experts, read.active, read.macs),
            "shared_experts": _swiglu(d_model, shared, lora) if shared else Weights(),
        }

    def shapes(self, d_model: int, lora: WeightLoRAConfig | None) -> Shapes:
        """The parameters of one layer; those of all routed experts are stacked."""
        shared = self.num_shared_experts * self.shared_width
        return {
            "router.weight": (self.num_experts, d_model),
            "gate_up": (self.num_experts, 2 * self.d_expert, d_model),
            "down": (self.num_experts, d_model, self.d_expert),
            **(within("shared", _swiglu_shapes(d_model, shared, lora)) if shared else {}),
        }

    def kept_bytes(self, d_model: int, tp: int = 1, ep: int = 1) -> int:
        """Bytes that a layer keeps per token for its backward pass, uncompiled, in bfloat16.

        ``tp`` ranks divide the layer, ``ep`` ranks its experts.
        """
        router = 4 * d_model + 8 * self.num_experts + 8
        # Of each pair the gathered row, gate and up, three products of theirs, its places.
        pair = 2 * d_model + 10 * self.d_expert + 38
        if ep > 1:  # the result that came back, and the places of both sortings
            pair += 2 * d_model + 34
        pairs = self.num_experts_per_token // tp if ep > 1 else self.num_experts_per_token
        shared = _swiglu_kept(self.num_shared_experts * self.shared_width // tp)
        return router + pairs * pair + shared

    def unlooped(self) -> "MoEConfig":
        """The config for a model that runs once: with a single balancing bias."""
        return replace(self, bias_loops=1)


DenseConfig = SwiGLUConfig | ReLUSquaredConfig

FeedForwardConfig = SwiGLUConfig | ReLUSquaredConfig | MoEConfig


def _swiglu(d_model: int, width: int, lora: WeightLoRAConfig | None) -> Weights:
    return loop_linear(d_model, 2 * width, lora) + loop_linear(width, d_model, lora)


def _swiglu_shapes(d_model: int, width: int, lora: WeightLoRAConfig | None) -> Shapes:
    gate_up = loop_linear_shapes(d_model, 2 * width, lora)
    return within("gate_up", gate_up) | within("down", loop_linear_shapes(width, d_model, lora))


def _swiglu_kept(width: int) -> int:
    """Gate and up, SiLU(gate), and their product, which is the second layer's input."""
    return 8 * width
