"""Experiment 5: python -m experiments.halting.run --scale small"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Conclusion
from experiments.equal_accuracy import course
from experiments.halting.arm import ARMS, LEVEL, MOST_LOOPS, RATES, TRAINED_HOPS
from experiments.run_store import Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
HOPS = (*TRAINED_HOPS, 10, 12)
SMOKE = ("act_fixed_0", "act_variable_0", "act_variable_2", "pondernet", "plain", "stepping")

SIZES = {"smoke": (2, 8), "small": (1000, 512), "full": (3000, 2048)}  # steps, walks per length


class Halting(Study):
    """See README.md."""

    number = 5
    title = "What sets the number of loops?"
    scales = ("smoke", "small", "full")

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        """Of each arm three rates, then three seeds at the best."""
        steps, walks = SIZES[scale]
        settings = {name: arm.settings(steps, walks) for name, arm in ARMS.items()}
        if scale == "smoke":
            return [Run(name, 0, {**settings[name], "rate": 1.0}) for name in SMOKE]
        found: list[Run] = []
        for name in ARMS:
            choice = tuned(done, name, settings[name], RATES, lambda r: r.data["learnt"])
            found += choice.then(name, settings[name], SEEDS)
        return found

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        """Train on walks, then follow the head and every exit rule."""
        from experiments.halting.exits import briefly, learnt, record
        from openmythos.train.metrics import read_metrics
        from openmythos.train.run import set_up
        from openmythos.train.task import PuzzleTask

        arm, settings = ARMS[run.arm], run.settings
        config = arm.config(run.seed, settings["rate"], settings["steps"])
        trained = set_up(config, out / "model")
        if trained.train().interrupted:
            raise KeyboardInterrupt
        assert isinstance(trained.task, PuzzleTask)
        found = record(trained.model, trained.task.puzzle, HOPS, settings["walks"], MOST_LOOPS)
        rows = [r for r in read_metrics(out / "model" / "metrics.jsonl") if r["kind"] == "train"]
        stages: dict[str, int] = {}
        for row in rows:
            stages.setdefault(str(int(row["stage"])), int(row["step"]))
        walks, count = trained.task.puzzle, settings["walks"]
        found |= {"stages": stages, "learnt": learnt(arm, trained.model, walks, count)}
        if run.tuning:
            return found
        way = course(trained, out, [LEVEL], lambda m: learnt(arm, m, walks, count))
        found["by_step"] = way.by_step
        found["equal_accuracy"] = way.at(
            LEVEL, lambda m: briefly(m, walks, HOPS, count, MOST_LOOPS)
        )
        return found

    def conclude(self, results: Results) -> Conclusion:
        """One verdict per claim, the tables and the figures' data."""
        from experiments.halting.conclude import VERDICTS
        from experiments.halting.table import figures, tables

        verdicts = [VERDICTS[name](claim, results) for name, claim in self.claims.items()]
        return Conclusion(verdicts=verdicts, tables=tables(results), figures=figures(results))

    def draw(self, conclusion: Conclusion) -> "Mapping[str, Figure]":
        """The four pictures."""
        from experiments.halting.picture import draw

        return draw(conclusion.figures)


STUDY = Halting()

if __name__ == "__main__":
    main(STUDY)
