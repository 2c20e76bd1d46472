"""Injection: how the prelude's output e enters the state h at every loop. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.member import Member, Whole
from openmythos.config.schema import require
from openmythos.config.weights import Shapes, Weights, matrix, vector


class InjectionMember(Member):
    """What every injection config states beside its fields."""

    kind: ClassVar[str]
    has_update: ClassVar[bool] = False  # whether the next state is more than the core's output

    @property
    def adds_e(self) -> bool:
        """Whether e is added at every loop; otherwise it enters through h_0 only."""
        return True

    def drive_weights(self, d_model: int) -> Weights:
        """The weights that are applied to e, once per forward."""
        return Weights()

    def weights(self, d_model: int) -> Weights:
        """The weights that are applied at every loop."""
        return Weights()

    def shapes(self, d_model: int) -> Shapes:
        """All of its parameters."""
        return {}

    def check(self, model: Whole) -> None:
        """See ``Member.check``."""
        if not self.adds_e:
            _require_copy(model, f"injection {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class LTIInjectionConfig(InjectionMember):
    """x = A h + Delta B e, h' = core(x) (Parcae).

    A is diagonal, and its spectral radius rho(A) is below 1 by construction.

    Attributes:
        decay_init: Initial value of all entries of A, between 0 and 1.
        orthogonal: Whether A h loses its component along Delta B e (IFM's OrthoInj).
    """

    kind: ClassVar[str] = "lti"
    decay_init: float = 0.2**0.5
    orthogonal: bool = False

    def __post_init__(self) -> None:
        require(0 < self.decay_init < 1, "injection.decay_init", self.decay_init, "in (0, 1)")

    def drive_weights(self, d_model: int) -> Weights:
        """B."""
        return matrix(d_model, d_model)

    def weights(self, d_model: int) -> Weights:
        """A and Delta."""
        return vector(2 * d_model)

    def shapes(self, d_model: int) -> Shapes:
        """See ``InjectionMember.shapes``."""
        return {"a_log": (d_model,), "dt_bias": (d_model,), "weight": (d_model, d_model)}


@dataclass(frozen=True, kw_only=True)
class OriginalLTIInjectionConfig(InjectionMember):
    """x = norm(h + e), h' = A h + B e + core(x), as in the original OpenMythos.

    A and B are diagonal. The step size Delta scales A only; B is not discretised.
    """

    kind: ClassVar[str] = "original_lti"
    has_update: ClassVar[bool] = True

    def weights(self, d_model: int) -> Weights:
        """A, B, the norm and one step size."""
        return vector(3 * d_model + 1)

    def shapes(self, d_model: int) -> Shapes:
        """See ``InjectionMember.shapes``."""
        vectors = dict.fromkeys(("log_a", "weight", "norm.weight"), (d_model,))
        return {**vectors, "log_dt": (1,)}


@dataclass(frozen=True, kw_only=True)
class LinearInjectionConfig(InjectionMember):
    """x = W_h h + W_e e, h' = core(x) (Huginn); it starts as x = h + e.

    Attributes:
        bias: Whether a learned vector is added to x.
    """

    kind: ClassVar[str] = "linear"
    bias: bool = False

    def drive_weights(self, d_model: int) -> Weights:
        """W_e, and the bias."""
        return matrix(d_model, d_model) + (vector(d_model) if self.bias else Weights())

    def weights(self, d_model: int) -> Weights:
        """W_h."""
        return matrix(d_model, d_model)

    def shapes(self, d_model: int) -> Shapes:
        """See ``InjectionMember.shapes``."""
        bias: Shapes = {"bias": (d_model,)} if self.bias else {}
        return {"h_weight": (d_model, d_model), "e_weight": (d_model, d_model)} | bias


@dataclass(frozen=True, kw_only=True)
class AddInjectionConfig(InjectionMember):
    """x = h + e, h' = core(x)."""

    kind: ClassVar[str] = "add"


@dataclass(frozen=True, kw_only=True)
class NoInjectionConfig(InjectionMember):
    """x = h, h' = core(x); e enters only through the initial state (Ouro)."""

    kind: ClassVar[str] = "none"

    @property
    def adds_e(self) -> bool:
        """See ``InjectionMember.adds_e``."""
        return False


@dataclass(frozen=True, kw_only=True)
class GateInjectionConfig(InjectionMember):
    """y = core(h + e), z = sigmoid(W [y; h] + bias), h' = z y + (1 - z) h.

    With ``add_e`` False, y = core(h) and the tokens enter through h_0 only, as in Chen's model,
    which adds a learned vector per loop instead (the ``learned`` loop embedding).

    Attributes:
        bias_init: Initial bias of the gate; the lower, the less is changed at first.
        add_e: Whether e is added to the core's input at every loop.

    Source: Chen 2026 (arXiv 2603.21676).
    """

    kind: ClassVar[str] = "gate"
    has_update: ClassVar[bool] = True
    bias_init: float = -2.0
    add_e: bool = True

    @property
    def adds_e(self) -> bool:
        """See ``InjectionMember.adds_e``."""
        return self.add_e

    def weights(self, d_model: int) -> Weights:
        """W and its bias."""
        return matrix(2 * d_model, d_model) + vector(d_model)

    def shapes(self, d_model: int) -> Shapes:
        """See ``InjectionMember.shapes``."""
        return {"gate.weight": (d_model, 2 * d_model), "gate.bias": (d_model,)}

    def check(self, model: Whole) -> None:
        """See ``Member.check``."""
        if not self.add_e:
            _require_copy(model, f"injection {self.kind!r} and add_e=false")


def _require_copy(model: Whole, injection: str) -> None:
    allowed = f"'copy' with {injection}, or the tokens would never reach the state"
    require(model.state_init.copies_e, "state_init.kind", model.state_init.kind, allowed)


InjectionConfig = (
    LTIInjectionConfig
    | OriginalLTIInjectionConfig
    | LinearInjectionConfig
    | AddInjectionConfig
    | NoInjectionConfig
    | GateInjectionConfig
)
