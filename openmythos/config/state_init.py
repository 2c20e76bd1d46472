"""The initial state h_0, before the first loop. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.member import Member


class StateInitMember(Member):
    """What every initial state's config states beside its fields."""

    copies_e: ClassVar[bool] = False  # whether h_0 is the prelude's output e
    is_random: ClassVar[bool] = False  # whether h_0 depends on a seed


@dataclass(frozen=True, kw_only=True)
class ZerosInitConfig(StateInitMember):
    """h_0 = 0."""

    kind: ClassVar[str] = "zeros"


@dataclass(frozen=True, kw_only=True)
class CopyInitConfig(StateInitMember):
    """h_0 = e."""

    kind: ClassVar[str] = "copy"
    copies_e: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NormalInitConfig(StateInitMember):
    """h_0 from a truncated normal distribution, by (seed, position, channel).

    Attributes:
        std: Standard deviation; the distribution is cut off at 3 of them.
    """

    kind: ClassVar[str] = "normal"
    is_random: ClassVar[bool] = True
    std: float = 1.0


StateInitConfig = ZerosInitConfig | CopyInitConfig | NormalInitConfig
