"""The state before the first loop, h_0. No torch."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class ZerosInitConfig:
    """h_0 = 0."""

    kind: ClassVar[str] = "zeros"


@dataclass(frozen=True, kw_only=True)
class CopyInitConfig:
    """h_0 = e."""

    kind: ClassVar[str] = "copy"


@dataclass(frozen=True, kw_only=True)
class NormalInitConfig:
    """h_0 ~ truncated normal (3 sigma), a function of (seed, position, channel)."""

    kind: ClassVar[str] = "normal"
    std: float = 1.0


StateInitConfig = ZerosInitConfig | CopyInitConfig | NormalInitConfig
