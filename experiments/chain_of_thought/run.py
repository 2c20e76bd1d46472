"""Experiment 7: python -m experiments.chain_of_thought.run --scale small"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.chain_of_thought.arm import ARMS, RATES, TRAINED_HOPS
from experiments.chain_of_thought.conclude import BEYOND, LEVEL, MOST_LOOPS, conclude
from experiments.claim import Conclusion
from experiments.equal_accuracy import course
from experiments.run_store import Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
HOPS = (*TRAINED_HOPS, *map(int, BEYOND))
SIZES = {"smoke": (2, 8), "small": (1200, 512), "full": (4000, 2048)}  # steps, walks per length


class ChainOfThought(Study):
    """See README.md."""

    number = 7
    title = "Is a loop a step of a chain of thought?"
    scales = ("smoke", "small", "full")

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        """Of each arm three rates, then three seeds at the best."""
        steps, walks = SIZES[scale]
        settings = {name: arm.settings(steps, walks) for name, arm in ARMS.items()}
        if scale == "smoke":
            return [Run(name, 0, {**settings[name], "rate": 1.0}) for name in ARMS]
        found: list[Run] = []
        for name in ARMS:
            choice = tuned(done, name, settings[name], RATES, lambda r: r.data["learnt"])
            found += choice.then(name, settings[name], SEEDS)
        return found

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        """Train, then let the model answer."""
        from experiments.chain_of_thought.answer import learnt, record
        from openmythos.train.run import set_up
        from openmythos.train.task import PuzzleTask

        settings = run.settings
        config = ARMS[run.arm].config(run.seed, settings["rate"], settings["steps"])
        trained = set_up(config, out / "model")
        if trained.train().interrupted:
            raise KeyboardInterrupt
        assert isinstance(trained.task, PuzzleTask)
        walks, count = trained.task.puzzle, settings["walks"]
        found = record(trained.model, walks, HOPS, count, MOST_LOOPS)
        if run.tuning:
            return found
        way = course(trained, out, [LEVEL], lambda model: learnt(model, walks, count))
        found["by_step"] = way.by_step
        found["equal_accuracy"] = way.at(
            LEVEL, lambda model: record(model, walks, HOPS, count, MOST_LOOPS)
        )
        return found

    def conclude(self, results: Results) -> Conclusion:
        """One verdict per claim, the tables and the figures' data."""
        return conclude(self.claims, results)

    def draw(self, conclusion: Conclusion) -> "Mapping[str, Figure]":
        """Accuracy over hops at equal FLOPs, and what the silent loop would say on the way."""
        from experiments.chain_of_thought.picture import draw

        return draw(conclusion.figures)


STUDY = ChainOfThought()

if __name__ == "__main__":
    main(STUDY)
