"""Learned halting: a distribution over the loops of each token. No torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from openmythos.config.member import Member
from openmythos.config.schema import require, require_literals
from openmythos.config.weights import Shapes, Weights, matrix, vector


class HaltingMember(Member):
    """What every halting config states beside its fields."""

    # Whether the readout mixes states by the head's weights: then the last loop's loss trains it.
    mixes_states: ClassVar[bool] = False

    def weights(self, d_model: int) -> Weights:
        """The weights of the head: a linear map from the state to one logit, with a bias."""
        return matrix(d_model, 1) + vector(1)

    def shapes(self, d_model: int) -> Shapes:
        """The parameters of the head."""
        return {"proj.weight": (1, d_model), "proj.bias": (1,)}


@dataclass(frozen=True, kw_only=True)
class ACTConfig(HaltingMember):
    """Adaptive computation time: the readout is a weighted sum of states (Graves 2016).

    A token's last loop gets the remainder as weight.

    Attributes:
        threshold: A token halts when its halting probabilities sum to this.
        bias_init: Initial bias of the halting logit; the lower, the later tokens halt at first.
        keep_remainder: Whether a token that has not halted when the loops end gets its remainder.
            False exists to load checkpoints of the original OpenMythos.
    """

    kind: ClassVar[str] = "act"
    mixes_states: ClassVar[bool] = True
    threshold: float = 0.99
    bias_init: float = -3.0
    keep_remainder: bool = True

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "halting.threshold", self.threshold, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class UniversalACTConfig(ACTConfig):
    """The Universal Transformer's ACT: the head reads the state at the start of a loop.

    ``keep_remainder`` False is the published code.

    Attributes:
        bias_init: Initial bias of the halting logit.
        readout: accumulated: Graves' weighted sum. basic: w state + (1 - w) readout at every loop,
            from zero, so that earlier loops fade and the weights do not sum to 1.

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
    """PonderNet: loop n has the exit probability lambda_n prod_{j<n} (1 - lambda_j).

    The probabilities weight the loss of each loop; states are not mixed.

    Attributes:
        bias_init: Initial bias of the exit logit; the lower, the later tokens exit at first.
    """

    kind: ClassVar[str] = "pondernet"
    bias_init: float = -2.0


@dataclass(frozen=True, kw_only=True)
class ExitGateConfig(HaltingMember):
    """Ouro's gate: PonderNet's distribution, trained with an entropy term.

    Attributes:
        bias_init: Initial bias of the exit logit; the lower, the later tokens exit at first.
    """

    kind: ClassVar[str] = "exit_gate"
    bias_init: float = 0.0


HaltingConfig = ACTConfig | UniversalACTConfig | PonderNetConfig | ExitGateConfig
