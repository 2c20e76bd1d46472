"""What the demo measured: outcomes per document and per walk, and the numbers that follow.

Outcomes are kept, because two settings are compared on the same documents or walks: the error of
their difference is that of the paired differences, far smaller than the scores' own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from openmythos.analysis.trace import LoopTrace
from openmythos.config.schema import json_ready
from openmythos.eval.score import Outcomes, Score, differences, summarise
from openmythos.report.page import Sample


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """Act 1: a model trained on real text.

    Attributes:
        train_curve: Points (seconds, training bits per byte).
        held_out_curve: Points (seconds, held-out bits per byte) measured during training.
        held_out: By number of loops, after training: bits and bytes of each held-out document.
        mean_recurrence: Mean depth in training.
        sampled_loops: The smallest and largest depth that training usually drew.
        depth_sampling: How the depth was drawn, in words.
        max_loops: The most loops that the exit rule may take.
        exit_rule: The rule that chose the samples' loops, in words.
        marks: Bits per byte of other compressors on the same documents, by name, such as "xz -9".
    """

    train_curve: Sequence[tuple[float, float]]
    held_out: Mapping[int, Outcomes]
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
        """Check that there is a held-out number."""
        if not self.held_out:
            raise ValueError("held_out is empty; give the documents' bits for some loop count")

    @cached_property
    def validation(self) -> dict[int, Score]:
        """Held-out bits per byte by number of loops, with the standard error over documents."""
        return {loops: summarise(documents) for loops, documents in self.held_out.items()}

    @property
    def best(self) -> int:
        """The fewest loops with the lowest held-out bits per byte."""
        return min(self.validation, key=lambda n: (self.validation[n].value, n))

    def difference(self, loops: int, other: int) -> Score:
        """Bits per byte at ``loops`` minus those at ``other``, document by document."""
        return summarise(differences(self.held_out[loops], self.held_out[other]))

    @property
    def trained_depth(self) -> int:
        """The evaluated number of loops nearest to the mean depth in training."""
        return min(self.validation, key=lambda n: abs(math.log(n / self.mean_recurrence)))


@dataclass(frozen=True, kw_only=True)
class HopsResult:
    """Act 2: a model trained on walks of known difficulty.

    Attributes:
        name: The model's name, a panel's title.
        decider: What chooses the loops, in one or two words ("exit rule", "ACT halting").
        exit_rule: The decider with its settings, in words.
        hops: Evaluated numbers of hops, rising.
        loops: Evaluated numbers of loops, rising.
        right: For ``hops[i]`` at ``loops[j]``: whether held-out walk k is answered right. The
            walks of a number of hops are the same in every result of one demo.
        max_train_hops: Hops of the longest walks in training.
        trained_loops: The smallest and largest depth that training drew.
        taken: The loops that each walk takes under the decider.
        taken_right: Whether each walk is answered right under the decider.
        rank_correlation: Rank correlation of loops taken with hops; None where it is not defined.
        leak_baselines: By hops, then by name: accuracy of guessers that do not follow the walk.
        chance: Accuracy of a uniform guess.
        stage_curve: Points (step, hops of the curriculum's stage).
    """

    name: str = "This model"
    decider: str = "exit rule"
    exit_rule: str
    hops: Sequence[int]
    loops: Sequence[int]
    right: Bool[np.ndarray, "hops loops walks"]
    max_train_hops: int
    trained_loops: tuple[int, int]
    taken: Int[np.ndarray, "hops walks"]
    taken_right: Bool[np.ndarray, "hops walks"]
    rank_correlation: float | None
    leak_baselines: Mapping[int, Mapping[str, float]]
    chance: float
    stage_curve: Sequence[tuple[int, int]]
    trace: LoopTrace
    seconds: float
    steps: int

    def __post_init__(self) -> None:
        """Check that the sizes of the tables fit."""
        grid = (len(self.hops), len(self.loops), self.num_walks)
        for name, size in {"right": grid, "taken": grid[::2], "taken_right": grid[::2]}.items():
            given = getattr(self, name).shape
            if given != size or not all(size):
                raise ValueError(f"{name} is {given}; by hops, loops and walks it must be {size}")
        for name in ("hops", "loops"):
            values = list(getattr(self, name))
            if values != sorted(set(values)):
                raise ValueError(f"{name} is {values}; it must rise")

    @property
    def trained_hops(self) -> list[int]:
        """Evaluated numbers of hops that training showed."""
        return [hops for hops in self.hops if hops <= self.max_train_hops]

    @property
    def unseen_hops(self) -> list[int]:
        """Evaluated numbers of hops beyond those in training."""
        return [hops for hops in self.hops if hops > self.max_train_hops]

    @property
    def num_walks(self) -> int:
        """Held-out walks per number of hops."""
        return self.right.shape[-1]

    @property
    def accuracy(self) -> list[list[float]]:
        """Accuracy on held-out walks, ``accuracy[i][j]`` for ``hops[i]`` at ``loops[j]``."""
        return self.right.mean(axis=-1).tolist()

    @property
    def exit_loops(self) -> list[float]:
        """Mean loops taken under the decider, one entry per ``hops``."""
        return self.taken.mean(axis=-1).tolist()

    @property
    def exit_accuracy(self) -> list[float]:
        """Accuracy under the decider, one entry per ``hops``."""
        return self.taken_right.mean(axis=-1).tolist()

    def answers(self, hops: int, loops: int) -> Bool[np.ndarray, " walks"]:
        """Which walks of ``hops`` hops are answered right at ``loops`` loops."""
        return self.right[list(self.hops).index(hops), list(self.loops).index(loops)]

    def at(self, hops: int, loops: int) -> Score:
        """Accuracy on walks of ``hops`` hops at ``loops`` loops."""
        return mean(self.answers(hops, loops))

    def best(self, hops: int) -> tuple[int, Score]:
        """The fewest loops that reach the highest accuracy on these walks, and that accuracy."""
        row = self.accuracy[list(self.hops).index(hops)]
        loops = self.loops[row.index(max(row))]
        return loops, self.at(hops, loops)

    def of_decider(self, hops: int) -> tuple[Score, Score]:
        """The loops that walks of ``hops`` hops take under the decider, and the accuracy then."""
        row = list(self.hops).index(hops)
        return mean(self.taken[row]), mean(self.taken_right[row])

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the outcomes of single walks summed up."""
        single = ("right", "taken", "taken_right")
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in single}
        means = ("accuracy", "exit_loops", "exit_accuracy", "num_walks")
        record |= {name: getattr(self, name) for name in means}
        grid = [[self.at(hops, loops).stderr for loops in self.loops] for hops in self.hops]
        deciders = [self.of_decider(hops) for hops in self.hops]
        return record | {
            "trace": asdict(self.trace),
            "accuracy_stderr": grid,
            "exit_loops_stderr": [loops.stderr for loops, _ in deciders],
            "exit_accuracy_stderr": [accuracy.stderr for _, accuracy in deciders],
        }


def mean(values: np.ndarray) -> Score:
    """The mean over walks and its standard error."""
    return summarise([(float(value), 1.0) for value in values])


def paired(values: np.ndarray, others: np.ndarray) -> Score:
    """The mean of ``values`` minus that of ``others``, walk by walk."""
    return mean(values.astype(float) - others.astype(float))


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """Everything that the report shows.

    Attributes:
        original_halting: The result of the same model with the original OpenMythos' halting.
        total_seconds: Wall time of the whole demo.
        machine: The machine in words.
        command: The command that made this report.
    """

    text: TextResult
    hops: HopsResult
    original_halting: HopsResult | None = None
    total_seconds: float
    machine: str
    version: str
    command: str

    def to_dict(self) -> dict[str, Any]:
        """The results, ready for strict JSON: numbers that are not finite become null."""
        text = asdict(self.text)
        del text["held_out"]
        text["validation"] = {n: asdict(score) for n, score in self.text.validation.items()}
        text["differences"] = {  # to the depth of training, document by document
            n: asdict(self.text.difference(n, self.text.trained_depth)) for n in self.text.held_out
        }
        original = self.original_halting and self.original_halting.to_dict()
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return json_ready(
            record | {"text": text, "hops": self.hops.to_dict(), "original_halting": original}
        )
