"""Injection: how the prelude's output e re-enters at every loop. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.schema import require


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


InjectionConfig = (
    LTIInjectionConfig
    | OriginalLTIInjectionConfig
    | LinearInjectionConfig
    | AddInjectionConfig
    | NoInjectionConfig
    | GateInjectionConfig
)
