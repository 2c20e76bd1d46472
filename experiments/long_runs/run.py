"""Hours, on request: budgets of recurrence, two hops over held-out facts, depth attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Conclusion
from experiments.long_runs import depth_attention, recurrence, two_hops
from experiments.run_store import Results, Run
from experiments.study import Study, main

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LongRuns(Study):
    number = 9
    title = "Hours, on request: power laws of recurrence, two hops over new facts, depth attention"
    scales = ("smoke", "full")
    page_scale = "full"

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        parts = (recurrence, two_hops, depth_attention)
        return [run for part in parts for run in part.runs(scale, done)]

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        if run.arm in two_hops.ARMS:
            return two_hops.measure(run, out)
        if run.arm in depth_attention.ARMS:
            return depth_attention.measure(run, scale, out)
        return recurrence.measure(run, scale, out)

    def conclude(self, results: Results) -> Conclusion:
        claims, rows = self.claims, recurrence.points(results)
        return Conclusion(
            verdicts=[
                recurrence.decide(claims["power-laws"], results),
                two_hops.decide(claims["two-hops-over-held-out-facts"], results),
                depth_attention.decide(claims["depth-attention-at-matched-memory"], results),
            ],
            tables=[
                recurrence.loss_table(rows),
                two_hops.score_table(results),
                two_hops.size_table(),
                depth_attention.bits_table(results),
                depth_attention.size_table(),
            ],
            figures={"recurrence": rows, "two_hops": two_hops.scores(results)},
        )

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.long_runs import picture

        data = conclusion.figures
        return {
            "recurrence": picture.draw_losses(data["recurrence"]),
            "two_hops": picture.draw_two_hops(data["two_hops"]),
        }


STUDY = LongRuns()

if __name__ == "__main__":
    main(STUDY)
