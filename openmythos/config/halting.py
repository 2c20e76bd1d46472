"""Learned halting: a distribution over the loops of each token. No torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from openmythos.config.member import Member
from openmythos.config.schema import require, require_literals
from openmythos.config.weights import Weights, matrix, vector


class HaltingMember(Member):
    """What a halting head says of itself."""

    def weights(self, d_model: int) -> Weights:
        """Those of the head, by default one logit of the state."""
        return matrix(d_model, 1) + vector(1)


@dataclass(frozen=True, kw_only=True)
class ACTConfig(HaltingMember):
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
class PonderNetConfig(HaltingMember):
    """Exit probabilities lambda_n prod(1 - lambda_j); the loss is weighted, not the state."""

    kind: ClassVar[str] = "pondernet"
    bias_init: float = -2.0


@dataclass(frozen=True, kw_only=True)
class ExitGateConfig(HaltingMember):
    """Ouro's gate: PonderNet's distribution, trained with an entropy term."""

    kind: ClassVar[str] = "exit_gate"
    bias_init: float = 0.0


HaltingConfig = ACTConfig | UniversalACTConfig | PonderNetConfig | ExitGateConfig
