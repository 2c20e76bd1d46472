"""A looped SmolLM2 fine-tuned on questions in words, at fixed and at sampled depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Conclusion
from experiments.run_store import Results, Run
from experiments.study import Study, main
from experiments.words_by_loops import verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
STEPS, ASKED, RATE = 30, 24, 0.002


class WordsByLoops(Study):
    number = 11
    title = "A looped SmolLM2 fine-tuned on questions in words: what more loops answer"
    scales = ("small",)

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        settings = {"steps": STEPS, "asked": ASKED, "rate": RATE}
        found = [Run("before", 0, {"asked": ASKED})]
        return found + [Run(arm, seed, settings) for seed in SEEDS for arm in verdicts.ARMS]

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        from experiments.words_by_loops.model import measure

        return measure(run, out)

    def conclude(self, results: Results) -> Conclusion:
        return verdicts.conclude(self.claims, results)

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.words_by_loops.picture import draw

        return {"by_loops": draw(conclusion.figures["by_loops"])}


STUDY = WordsByLoops()

if __name__ == "__main__":
    main(STUDY)
