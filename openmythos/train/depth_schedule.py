"""How many loops a training step runs, drawn from seed and step, so that all ranks agree."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from openmythos.config.schema import require, require_literals, require_positive


@dataclass(frozen=True, kw_only=True)
class FixedDepth:
    """Always the same number of loops.

    Attributes:
        mean_recurrence: Mean number of loops.
    """

    kind: ClassVar[str] = "fixed"
    mean_recurrence: int = 4

    def __post_init__(self) -> None:
        require_positive(self, "mean_recurrence")

    def draw(self, mean: float, size: int, generator: torch.Generator) -> Int[Tensor, "N"]:
        """``size`` depths with this mean, which is below ``mean_recurrence`` during a ramp."""
        return torch.full((size,), max(1, round(mean)))

    def in_words(self, most: int) -> str:
        """Which loops are drawn, at most ``most``."""
        return f"always {self.mean_recurrence} loop{'s' * (self.mean_recurrence != 1)}"


@dataclass(frozen=True, kw_only=True)
class PoissonDepth(FixedDepth):
    """max(1, Poisson(mean)).

    Source: Parcae (arXiv 2604.12946), algorithm 4.
    """

    kind: ClassVar[str] = "poisson"

    def draw(self, mean: float, size: int, generator: torch.Generator) -> Int[Tensor, "N"]:
        """See ``FixedDepth.draw``."""
        return (
            torch.poisson(torch.full((size,), float(mean)), generator=generator).long().clamp(min=1)
        )

    def in_words(self, most: int) -> str:
        """See ``FixedDepth.in_words``."""
        return f"1 to {most} loops around {self.mean_recurrence} (Poisson)"


@dataclass(frozen=True, kw_only=True)
class ClippedPoissonDepth(PoissonDepth):
    """Poisson(mean) clipped at both ends.

    Attributes:
        low: Fewest loops.
        high: Most loops.

    Source: Loop, Think and Generalize (arXiv 2604.07822), section 4.1.
    """

    kind: ClassVar[str] = "clipped_poisson"
    low: int = 2
    high: int = 8

    def __post_init__(self) -> None:
        require_positive(self, "mean_recurrence", "low")
        require(self.high >= self.low, "depth.high", self.high, f"at least low={self.low}")

    def draw(self, mean: float, size: int, generator: torch.Generator) -> Int[Tensor, "N"]:
        """See ``FixedDepth.draw``."""
        return super().draw(mean, size, generator).clamp(self.low, self.high)

    def in_words(self, most: int) -> str:
        """See ``FixedDepth.in_words``."""
        ends = f"{self.low} to {min(most, self.high)}"
        return f"{ends} loops around {self.mean_recurrence} (Poisson)"


@dataclass(frozen=True, kw_only=True)
class UniformDepth:
    """Uniform between two numbers; with the loss of the final loop it is Chen's silent objective.

    Attributes:
        low: Fewest loops.
        high: Most loops.

    Source: Chen 2026 (arXiv 2603.21676).
    """

    kind: ClassVar[str] = "uniform"
    low: int = 2
    high: int = 8

    def __post_init__(self) -> None:
        require_positive(self, "low")
        require(self.high >= self.low, "depth.high", self.high, f"at least low={self.low}")

    @property
    def mean_recurrence(self) -> float:
        """The mean of ``low`` and ``high``."""
        return (self.low + self.high) / 2

    def draw(self, mean: float, size: int, generator: torch.Generator) -> Int[Tensor, "N"]:
        """See ``FixedDepth.draw``; during a ramp both ends grow from 1."""
        grown = (mean - 1) / (self.mean_recurrence - 1) if self.mean_recurrence > 1 else 1.0
        low, high = (round(1 + (end - 1) * grown) for end in (self.low, self.high))
        return torch.randint(low, high + 1, (size,), generator=generator)

    def in_words(self, most: int) -> str:
        """See ``FixedDepth.in_words``."""
        return f"{self.low} to {min(most, self.high)} loops, each as often"


@dataclass(frozen=True, kw_only=True)
class LogNormalPoissonDepth(FixedDepth):
    """1 + Poisson(rate) with a log-normal rate of mean ``mean``: a long tail of deep steps.

    Attributes:
        sigma: Standard deviation of the rate's logarithm; the larger, the longer the tail.

    Source: Huginn (arXiv 2502.05171), section 3.3 and its sampling code.
    """

    kind: ClassVar[str] = "log_normal_poisson"
    sigma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sigma >= 0, "depth.sigma", self.sigma, "at least 0")

    def draw(self, mean: float, size: int, generator: torch.Generator) -> Int[Tensor, "N"]:
        """See ``FixedDepth.draw``."""
        normal = torch.randn(size, generator=generator)
        rate = torch.exp(math.log(mean) - self.sigma**2 / 2 + self.sigma * normal)
        return torch.poisson(rate, generator=generator).long() + 1

    def in_words(self, most: int) -> str:
        """See ``FixedDepth.in_words``."""
        return f"1 to {most} loops around {self.mean_recurrence + 1} (log-normal Poisson)"


DepthConfig = FixedDepth | PoissonDepth | ClippedPoissonDepth | UniformDepth | LogNormalPoissonDepth


@dataclass(frozen=True, kw_only=True)
class DepthSchedule:
    """Depth of each step, and how many of its last loops get gradients.

    With p the share of the ramp that is done, its shapes are linear, 1 + (mean - 1) p; ceil_linear,
    ceil(mean p); and ceil_one_minus_sqrt, ceil(mean (1 - sqrt(1 - p))), which stays low for longer.

    Attributes:
        sampling: How the number of loops is drawn.
        per_sequence: Whether every row draws its own depth; otherwise all rows of a step share one.
        rows_per_draw: Consecutive rows that share a draw with ``per_sequence``.
        mean_backprop_depth: Last loops with gradients; null: all.
        ramp: Share of the run over which the mean depth grows from 1.
        ramp_shape: How it grows.
        max_loops: Most loops of a step, whatever is drawn.

    Source: Retrofitting recurrence (arXiv 2511.07384) and its train.py, for the two ceil shapes.
    """

    sampling: DepthConfig
    per_sequence: bool = False
    rows_per_draw: int = 1
    mean_backprop_depth: int | None = None
    ramp: float = 0.0
    ramp_shape: Literal["linear", "ceil_linear", "ceil_one_minus_sqrt"] = "linear"
    max_loops: int = 64

    def __post_init__(self) -> None:
        require_literals(self)
        require(0 <= self.ramp <= 1, "depth.ramp", self.ramp, "in 0..1")
        require_positive(self, "max_loops", "rows_per_draw")
        mean, allowed = self.sampling.mean_recurrence, f"at most max_loops={self.max_loops}"
        allowed += ", which --set train.depth.max_loops=N raises"
        require(mean <= self.max_loops, "depth.sampling.mean_recurrence", mean, allowed)
        if self.mean_backprop_depth is not None:
            require_positive(self, "mean_backprop_depth")

    def sample(
        self, *, seed: int, step: int, progress: float, batch_size: int
    ) -> tuple[Int[Tensor, "B"], int | None]:
        """Loops of each row, and the number of last loops with gradients.

        Args:
            seed: The run's seed.
            step: The optimiser step (or micro-step) to sample for.
            progress: Share of the run that is done, 0..1.
            batch_size: Number of rows; without ``per_sequence`` they all get the same depth.
        """
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        mean = self.mean(progress)
        per_draw = self.rows_per_draw if self.per_sequence else batch_size
        size = -(-batch_size // per_draw)
        depths = self.sampling.draw(mean, size, generator).clamp(max=self.max_loops)
        return depths.repeat_interleave(per_draw)[:batch_size], self.mean_backprop_depth

    @property
    def in_words(self) -> str:
        """What is drawn, for whom, and which loops get gradients."""
        drawn, back = self.sampling.in_words(self.max_loops), self.mean_backprop_depth
        if type(self.sampling) is not FixedDepth:
            drawn += ", drawn for every " + ("row" if self.per_sequence else "step")
        through = "all" if back is None else f"the last {back}" if back > 1 else "the last one"
        return f"{drawn}; gradients through {through}"

    def deepest(self, *, seed: int, steps: int, batch_size: int) -> int:
        """The most loops that a run of so many steps draws, were its ramp over."""
        drawn = (
            self.sample(seed=seed, step=step, progress=1.0, batch_size=batch_size)[0].max()
            for step in range(steps)
        )
        return int(max(drawn))

    def mean(self, progress: float) -> float:
        """The mean depth when ``progress`` (0..1) of the run is done."""
        mean = self.sampling.mean_recurrence
        if self.ramp == 0 or progress >= self.ramp:
            return float(mean)
        done = progress / self.ramp
        if self.ramp_shape == "linear":
            return 1 + (mean - 1) * done
        share = done if self.ramp_shape == "ceil_linear" else 1 - math.sqrt(1 - done)
        return float(max(1, math.ceil(mean * share)))
