"""One transformer block: where its norms are applied. No torch."""

from dataclasses import dataclass
from typing import Literal

from openmythos.config.member import Member
from openmythos.config.schema import require, require_literals
from openmythos.config.weights import Shapes, Weights, vector


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Member):
    """Where a block applies its norms n and n' around attention or feed-forward, f.

    Attributes:
        norm: pre: x + f(n(x)). peri: x + n'(f(n(x))) (Ouro). sandwich: n'(x + f(n(x))) (Huginn).
        norm_eps: Added under the root of every RMSNorm.
        layer_scale: Each branch is multiplied by a learned vector that starts at this value; null:
            none.
    """

    norm: Literal["pre", "peri", "sandwich"] = "pre"
    norm_eps: float = 1e-6
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        require_literals(self)
        require(self.norm_eps > 0, "block.norm_eps", self.norm_eps, "above 0")

    def weights(self, d_model: int) -> Weights:
        """The weights of one block's norms and scales."""
        num_norms = 2 if self.norm == "pre" else 4
        return vector(d_model) * (num_norms + (0 if self.layer_scale is None else 2))

    def kept_bytes(self, d_model: int) -> int:
        """Bytes that a block's norms keep per token, uncompiled, in bfloat16.

        With them what they hand to attention and feed-forward; see the ``kept_bytes`` of these.
        """
        # The state in float32, 1 / rms, and the product's input.
        branch = 6 * d_model + 4
        # Of a branch's output a copy in float32 and the quotient; of the state itself no copy.
        branch += {"pre": 0, "peri": 6 * d_model + 4, "sandwich": 4 * d_model + 4}[self.norm]
        return 2 * (branch + (0 if self.layer_scale is None else 2 * d_model))

    def shapes(self, d_model: int) -> Shapes:
        """The parameters of one block's norms and scales."""
        names = ["norm.weight"] if self.norm == "pre" else ["norm.weight", "out_norm.weight"]
        names += [] if self.layer_scale is None else ["scale"]
        branches = ("attention", "feed_forward")
        return {f"{branch}_{name}": (d_model,) for branch in branches for name in names}
