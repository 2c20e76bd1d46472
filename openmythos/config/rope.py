"""Rotary positions. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.member import Member, Whole
from openmythos.config.schema import require, require_positive


@dataclass(frozen=True, kw_only=True)
class Llama3ScalingConfig:
    """Slow rotations are slowed further by ``factor``, so that longer texts fit (Llama 3.1).

    Channels that turn less than ``low_freq_factor`` times in ``original_max_seq_len`` tokens are
    slowed, those above ``high_freq_factor`` keep their pace, those between are interpolated.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        require_positive(self, "factor", "original_max_seq_len")
        name, low, high = "rope.scaling.high_freq_factor", self.low_freq_factor, "above the low one"
        require(self.high_freq_factor > low > 0, name, self.high_freq_factor, f"{high}, {low}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Member):
    """Rotary positions. ``interleaved`` pairs channels (2j, 2j+1), otherwise (j, j + half)."""

    theta: float = 10_000.0
    interleaved: bool = False
    scaling: Llama3ScalingConfig | None = None

    def __post_init__(self) -> None:
        require(self.theta > 1, "rope.theta", self.theta, "above 1")

    def check(self, model: Whole) -> None:
        """See ``Member.check``."""
        dim = model.attention.rope_dim
        require(dim % 2 == 0, "the attention's rotary dimension", dim, "even")
