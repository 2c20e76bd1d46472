"""All instruments on one model, and the record that the analysis leaves.

What decides whether loops differ is measured by intervening: the reading map, the difference of its
rows, novelty, operator difference. What is read off while the loops run (trace, blocks, experts,
lenses) describes them and decides nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jaxtyping import Int
from torch import Tensor

from openmythos.analysis.budget import OverBudget, rows_within
from openmythos.analysis.depth import DepthCurve
from openmythos.analysis.difference import LoopDifference, loop_difference
from openmythos.analysis.dynamics import Dynamics
from openmythos.analysis.lens import LensRanks
from openmythos.analysis.novelty import Novelty, novelty
from openmythos.analysis.operator_difference import OperatorDifference, operator_difference
from openmythos.analysis.pairs import Pairs
from openmythos.analysis.reading import ReadingMap, reading_map
from openmythos.config.schema import json_ready
from openmythos.model.recurrent import RecurrentDepthLM

Found = TypeVar("Found")
SOME = 16  # pairs on which memory is counted


@dataclass(frozen=True, kw_only=True)
class Interventions:
    """What changing one loop shows, at one number of loops.

    Attributes:
        num_loops: The loops that the model runs.
        reading: The reading map.
        difference: The difference of its rows.
        operators: The difference of the loops' maps.
        novelty: None with one loop, or where ``left_out`` says why.
        left_out: Why an instrument is missing, by its name.
    """

    num_loops: int
    reading: ReadingMap
    difference: LoopDifference
    operators: OperatorDifference
    novelty: Novelty | None
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        return {
            "num_loops": self.num_loops,
            "reading_map": self.reading.to_dict(),
            "loop_difference": self.difference.to_dict(),
            "operator_difference": self.operators.to_dict(),
            "novelty": None if self.novelty is None else self.novelty.to_dict(),
            "left_out": self.left_out,
        }


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What all instruments say of a model.

    Attributes:
        model: Its name, as it was given.
        facts: What the model is, by name.
        examples: What it read, in words.
        depth: Accuracy by loops.
        at: What changing loops shows: at the fewest loops that are enough and, if that is another
            number, at those of the model's configuration.
        dynamics: What was read off while the loops ran.
        lenses: What the head says of states inside the loop.
        settings: What determines the numbers.
    """

    model: str
    facts: dict[str, Any]
    examples: str
    depth: DepthCurve
    at: tuple[Interventions, ...]
    dynamics: Dynamics
    lenses: list[LensRanks]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The record as strict JSON: what is not finite becomes null."""
        return json_ready(
            {
                "model": self.model,
                "facts": self.facts,
                "examples": self.examples,
                "settings": self.settings,
                "depth": self.depth.to_dict(),
                "interventions": [each.to_dict() for each in self.at],
                "dynamics": self.dynamics.to_dict(),
                "lenses": [lens.to_dict() for lens in self.lenses],
            }
        )


def intervene_at(
    model: RecurrentDepthLM,
    pairs: Pairs,
    fit: Int[Tensor, "M T"],
    num_loops: int,
    max_bytes: int,
    seed: int = 0,
) -> Interventions:
    """Map, loop difference, operators and novelty, in batches that fit into ``max_bytes``.

    Args:
        model: The model.
        pairs: Clean and corrupted texts.
        fit: Other texts of the same length, for novelty.
        num_loops: Loops to run.
        max_bytes: Bytes that a batch may take, besides the weights.
        seed: Of the intervals.

    Raises:
        OverBudget: Not even one pair fits. If only novelty does not, it is left out.
    """

    def run(instrument: Callable[[Pairs, int], Found]) -> Found:
        size = _pairs_within(max_bytes, pairs, instrument, model)
        return instrument(pairs, min(size, len(pairs)))

    reading = run(lambda part, size: reading_map(model, part, num_loops, batch_size=size))
    operators = run(
        lambda part, size: operator_difference(model, part.tokens, num_loops, batch_size=size)
    )
    found, left_out = None, {}
    if num_loops < 2:
        left_out["novelty"] = "there is one loop, and none before it"
    else:
        try:
            found = run(
                lambda part, size: novelty(
                    model,
                    part.tokens,
                    part.answers,
                    num_loops,
                    fit=fit,
                    batch_size=size,
                    seed=seed,
                )
            )
        except OverBudget as error:
            left_out["novelty"] = str(error)
    return Interventions(
        num_loops=num_loops,
        reading=reading,
        difference=loop_difference(reading, seed=seed),
        operators=operators,
        novelty=found,
        left_out=left_out,
    )


def _pairs_within(
    max_bytes: int,
    pairs: Pairs,
    instrument: Callable[[Pairs, int], object],
    model: RecurrentDepthLM,
    unit: int = SOME,
) -> int:
    """The most pairs that a batch may have; counted on some, or on one where some are too many."""
    some = next(pairs.batches(unit))
    try:
        return unit * rows_within(max_bytes, lambda: instrument(some, unit), model)
    except OverBudget:
        if unit == 1:
            raise
    return _pairs_within(max_bytes, pairs, instrument, model, 1)
