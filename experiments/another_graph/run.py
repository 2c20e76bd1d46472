"""A model of walks fine-tuned on another graph, at fixed and at sampled depth: is the dial left?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.another_graph import verdicts
from experiments.claim import Conclusion
from experiments.run_store import Results, Run
from experiments.study import Study, main

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (1, 2, 3)  # each with a graph of its own; 0 is the one that the base knows
SETTINGS = {"walks": 512, "most_loops": 32}
TRAINING = {"steps": 1200, "rate": 0.003}  # the base's own rate


class AnotherGraph(Study):
    """Experiment 12."""

    number = 12
    title = "A model of walks fine-tuned on another graph: is the dial left?"

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        """See ``Study``; the base is measured on the graph of the first seed."""
        if scale == "smoke":
            few = {"walks": 8, "most_loops": verdicts.MOST_LOOPS}
            tried = [Run(arm, 1, {**few, **TRAINING, "steps": 2}) for arm in verdicts.ARMS]
            return [Run(verdicts.BEFORE, 1, few), *tried]
        found = [Run(verdicts.BEFORE, SEEDS[0], SETTINGS)]
        return found + [
            Run(arm, seed, {**SETTINGS, **TRAINING}) for seed in SEEDS for arm in verdicts.ARMS
        ]

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        """See ``Study``."""
        from experiments.another_graph.model import measure

        return measure(run, out)

    def conclude(self, results: Results) -> Conclusion:
        """See ``Study``."""
        return verdicts.conclude(self.claims, results)

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        """See ``Study``."""
        from experiments.another_graph.picture import draw

        return {"dial": draw(conclusion.figures["dial"])}


STUDY = AnotherGraph()

if __name__ == "__main__":
    main(STUDY)
