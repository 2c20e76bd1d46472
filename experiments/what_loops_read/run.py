"""What each loop reads: is loop t + 1 doing something else than loop t?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Conclusion
from experiments.depth_dial.run import EQUAL_ACCURACY, lengths_learnt, on_the_way, train
from experiments.depth_dial.run import STUDY as DIAL
from experiments.run_store import Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned
from experiments.what_loops_read.arms import ARMS, config_of, dial_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from openmythos.train.run import Run as Training

SEEDS = (0, 1, 2)
RATES = (0.0015, 0.003, 0.006)
SETTINGS = {"steps": 1200, "walks": 512, "most_loops": 32}


class WhatLoopsRead(Study):
    """Experiment 2."""

    number = 2
    title = "What each loop reads"

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        """See ``Study``; none before the depth dial is complete, whose models are read."""
        if scale == "smoke":
            few = {"steps": 2, "walks": 8, "most_loops": 4, "rate": RATES[1]}
            return [Run(arm, 0, few) for arm in ("fixed", "stack", "lora", "coda", "untrained")]
        dials, of_dial = DIAL.current("small")
        if len(of_dial) < len(dials):
            return []
        found = []
        for arm, plan in ARMS.items():
            if not plan.trained:
                found += [Run(arm, seed, {**SETTINGS, "steps": 0, "rate": 0.0}) for seed in SEEDS]
            elif plan.change is None:
                theirs = [result.run for result in of_dial.of(plan.dial)]
                found += [Run(arm, one.seed, one.settings) for one in theirs if one.seed in SEEDS]
            else:
                choice = tuned(done, arm, SETTINGS, RATES, lambda r: float(r.data["progress"]))
                found += choice.then(arm, SETTINGS, SEEDS)
        return found

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        """See ``Study``."""
        from experiments.what_loops_read.measure import maps, measure

        trained = self.trained(run, scale, out)
        found: dict[str, Any] = {}
        size = run.settings["walks"]
        if ARMS[run.arm].trained:
            found["progress"] = lengths_learnt(trained, size)
        if run.tuning:
            return found
        walks = trained.task.puzzle
        found |= measure(run.arm, trained.model, walks, size)
        if ARMS[run.arm].trained:
            folder = self._trained_in(run, scale, out)
            way = on_the_way(trained, dial_run(run), folder)
            found["by_step"] = way.by_step
            found["equal_accuracy"] = way.at(
                EQUAL_ACCURACY, lambda model: maps(run.arm, model, walks, size)
            )
        return found

    def trained(self, run: Run, scale: str, out: Path) -> "Training":
        """The run's training, done; of the untrained control before its first step."""
        from openmythos.train.run import set_up

        plan = ARMS[run.arm]
        if not plan.trained:
            config = config_of(
                Run(run.arm, run.seed, {**run.settings, "steps": 1, "rate": RATES[0]})
            )
            return set_up(config, out / "model")
        folder = self._trained_in(run, scale, out)
        if plan.change is None:
            return train(dial_run(run), folder)
        found = set_up(config_of(run), folder / "model")
        if found.train().interrupted:
            raise KeyboardInterrupt
        return found

    @staticmethod
    def _trained_in(run: Run, scale: str, out: Path) -> Path:
        """The depth dial's folder of a model that is its own, made there or made now."""
        theirs = ARMS[run.arm].change is None
        return DIAL.run_folder(dial_run(run), scale, out.parents[2]) if theirs else out

    def conclude(self, results: Results) -> Conclusion:
        """See ``Study``."""
        from experiments.what_loops_read.verdicts import conclude

        return conclude(self.claims, results)

    def draw(self, conclusion: Conclusion) -> "Mapping[str, Figure]":
        """See ``Study``."""
        from experiments.what_loops_read.picture import draw

        return draw(conclusion)


STUDY = WhatLoopsRead()

if __name__ == "__main__":
    main(STUDY)
