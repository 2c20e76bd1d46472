"""The state before the first loop, h_0. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.member import Member


class StateInitMember(Member):
    """What an initial state says of itself."""

    copies_e: ClassVar[bool] = False  # the tokens are in h_0


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
    """h_0 ~ truncated normal (3 sigma), a function of (seed, position, channel)."""

    kind: ClassVar[str] = "normal"
    std: float = 1.0


StateInitConfig = ZerosInitConfig | CopyInitConfig | NormalInitConfig
