"""What the demo measured: plain numbers and text, ready for pictures, pages and JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from openmythos.analysis.trace import LoopTrace
from openmythos.config.schema import json_ready
from openmythos.report.page import Sample


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """Act 1: a model trained on real text.

    Attributes:
        train_curve: (seconds, training bits per byte).
        held_out_curve: (seconds, held-out bits per byte) measured during training.
        validation: Held-out bits per byte by number of loops, after training.
        mean_recurrence: Mean depth in training.
        sampled_loops: Smallest and largest depth that training usually drew.
        depth_sampling: How the depth was drawn, in words ("Poisson, a depth a sequence").
        max_loops: Limit of the exit rule; the top of the colour scale.
        exit_rule: The rule that chose the samples' loops, in words.
        marks: Bits per byte of other compressors by name ("xz -9": 1.81).
    """

    train_curve: Sequence[tuple[float, float]]
    validation: Mapping[int, float]
    mean_recurrence: float
    sampled_loops: tuple[int, int]
    depth_sampling: str
    num_params: int
    tokens_seen: int
    seconds: float
    samples: Sequence[Sample]
    max_loops: int
    exit_rule: str
    trace: LoopTrace
    held_out_curve: Sequence[tuple[float, float]] = ()
    marks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a result without a held-out number."""
        if not self.validation:
            raise ValueError("validation is empty; give bits per byte for at least one loop count")

    @property
    def trained_depth(self) -> int:
        """The evaluated number of loops nearest to the mean depth in training."""
        return min(self.validation, key=lambda n: abs(math.log(n / self.mean_recurrence)))


@dataclass(frozen=True, kw_only=True)
class HopsResult:
    """Act 2: a model trained on walks of known difficulty.

    Attributes:
        name: Of the model, as a panel's title.
        decider: What chooses the loops, in one or two words ("exit rule", "ACT halting").
        exit_rule: The same in full.
        hops: Evaluated lengths, rising.
        loops: Evaluated numbers of loops, rising.
        accuracy: On held-out walks, ``accuracy[h][l]`` for ``hops[h]`` at ``loops[l]``.
        max_train_hops: The longest walks in training.
        trained_loops: Smallest and largest depth that training drew.
        exit_loops: Mean loops that the decider takes, by hops.
        exit_accuracy: Accuracy when it decides, by hops.
        rank_correlation: Of loops taken with hops; None where it is not defined.
        leak_baselines: By hops, the accuracy of guessers that cannot follow the walk, by name.
        chance: Accuracy of a uniform guess.
        stage_curve: (step, hops of the curriculum's stage).
    """

    name: str = "This model"
    decider: str = "exit rule"
    exit_rule: str
    hops: Sequence[int]
    loops: Sequence[int]
    accuracy: Sequence[Sequence[float]]
    max_train_hops: int
    trained_loops: tuple[int, int]
    exit_loops: Sequence[float]
    exit_accuracy: Sequence[float]
    rank_correlation: float | None
    leak_baselines: Mapping[int, Mapping[str, float]]
    chance: float
    stage_curve: Sequence[tuple[int, int]]
    trace: LoopTrace
    seconds: float
    steps: int

    def __post_init__(self) -> None:
        """Refuse a table whose sides do not fit."""
        for name in ("accuracy", "exit_loops", "exit_accuracy"):
            given = len(getattr(self, name))
            if given != len(self.hops):
                raise ValueError(f"{name} has {given} rows; hops has {len(self.hops)}")
        if not self.hops or any(len(row) != len(self.loops) for row in self.accuracy):
            raise ValueError(f"accuracy needs a row of {len(self.loops)} numbers for every hop")
        for name in ("hops", "loops"):
            values = list(getattr(self, name))
            if values != sorted(set(values)):
                raise ValueError(f"{name} is {values}; it must rise")

    @property
    def trained_hops(self) -> list[int]:
        """Evaluated lengths that training showed."""
        return [hops for hops in self.hops if hops <= self.max_train_hops]

    @property
    def unseen_hops(self) -> list[int]:
        """Evaluated lengths beyond training."""
        return [hops for hops in self.hops if hops > self.max_train_hops]

    def at(self, hops: int, loops: int) -> float:
        """Accuracy on walks of ``hops`` hops at ``loops`` loops."""
        return self.accuracy[list(self.hops).index(hops)][list(self.loops).index(loops)]

    def best(self, hops: int) -> tuple[int, float]:
        """The fewest loops that reach the highest accuracy on these walks, and that accuracy."""
        row = self.accuracy[list(self.hops).index(hops)]
        return self.loops[row.index(max(row))], max(row)


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """Everything that the report shows.

    Attributes:
        original_halting: The same task and model with the original OpenMythos' halting.
        total_seconds: Wall time of the whole demo.
        machine: The machine in words.
        command: What made this report.
    """

    text: TextResult
    hops: HopsResult
    original_halting: HopsResult | None = None
    total_seconds: float
    machine: str
    version: str
    command: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for strict JSON: numbers that are not finite become null."""
        return json_ready(asdict(self))
