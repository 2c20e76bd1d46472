"""A study without a model: what its runs give is known."""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Conclusion, Table, verdict
from experiments.interval import gap
from experiments.run_store import Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = (0.01, 0.1, 1.0)
ARMS = {"good": 0.1, "poor": 10.0}  # the rate that suits each


class Planted(Study):
    number = 1
    title = "A planted answer"
    fresh_seeds = (3, 4)
    loads = ()

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        if scale == "smoke":
            fates = ("none", "diverges", "killed")
            return [Run("good", 0, {"rate": 0.1, "fate": fate}) for fate in fates]
        found = []
        for arm in ARMS:
            choice = tuned(done, arm, {}, RATES, lambda result: result.data["accuracy"])
            found += choice.runs
            if choice.rate is not None:
                found += [Run(arm, seed, {"rate": choice.rate}) for seed in (0, 1, 2)]
        return found

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        if scale == "waits":
            wait_for_a_signal(out)
        if run.settings.get("fate") == "diverges":
            raise RuntimeError(f"the loss is nan; kept: {out}/step-1")
        if run.settings.get("fate") == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        near = min(run.settings["rate"], ARMS[run.arm]) / max(run.settings["rate"], ARMS[run.arm])
        most = 0.9 if run.arm == "good" else 0.5
        return {
            "accuracy": most * near - 0.01 * (run.seed % 3),
            "threads": os.environ["OMP_NUM_THREADS"],
        }

    def conclude(self, results: Results) -> Conclusion:
        values = {arm: [r.data["accuracy"] for r in results.of(arm)] for arm in ARMS}
        least = self.claims["wins"].thresholds["least_gap"]
        if not all(values.values()):
            between, decision = gap([0], [0]), "no result"
        else:
            between = gap(values["good"], values["poor"])
            wins = between.difference.mean >= least
            decision = "no result" if not between.is_result else "holds" if wins else "fails"
        found = verdict("wins", decision, "By so much.", between.difference, figure="accuracy")
        table = Table("Accuracy", ["arm", "accuracy"], [[k, str(v)] for k, v in values.items()])
        return Conclusion(verdicts=[found], tables=[table], figures={"accuracy": values})

    def draw(self, conclusion: Conclusion) -> "Mapping[str, Figure]":
        from openmythos.analysis.picture import figure_of

        figure = figure_of(2.0, 2.0)
        figure.subplots().plot(conclusion.figures["accuracy"]["good"])
        return {"accuracy": figure}


def wait_for_a_signal(out: Path) -> None:
    def end(number: int, frame: object) -> None:
        (out / "ended").write_text(str(number))
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    (out / "started").touch()
    while True:
        time.sleep(0.1)


STUDY = Planted()

if __name__ == "__main__":
    main(STUDY)
