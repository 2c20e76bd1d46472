"""Rotary position embeddings (RoPE). No torch."""

from dataclasses import dataclass
from typing import ClassVar

from openmythos.config.member import Member, Whole
from openmythos.config.schema import require, require_positive


@dataclass(frozen=True, kw_only=True)
class Llama3ScalingConfig:
    """Llama 3.1's scaling for long contexts: low rotary frequencies are lowered.

    Frequencies between the two bounds are interpolated.

    Attributes:
        factor: What low frequencies are divided by.
        low_freq_factor: Frequencies of fewer turns than this in ``original_max_seq_len`` tokens are
            divided.
        high_freq_factor: Frequencies of more turns than this are kept.
        original_max_seq_len: Context that the model was trained at before, in tokens.
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
    """Rotary positions (RoPE).

    Attributes:
        theta: Base of the wavelengths: the longest is about 2 pi times this, in tokens.
        interleaved: Whether the channels (2j, 2j + 1) form a pair; otherwise (j, j + half) do.
        scaling: Scaling of the frequencies for long contexts; null: none.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    scaling: Llama3ScalingConfig | None = None

    def __post_init__(self) -> None:
        require(self.theta > 1, "rope.theta", self.theta, "above 1")

    def check(self, model: Whole) -> None:
        """See ``Member.check``."""
        dim = model.attention.rope_dim
        require(dim % 2 == 0, "the attention's rotary dimension", dim, "even")
