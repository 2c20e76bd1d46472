"""The depth dial: trained on walks of at most eight hops, what happens beyond?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Conclusion
from experiments.depth_dial.arms import ARMS, STACKS, TRAINED_HOPS, training
from experiments.equal_accuracy import Course, course
from experiments.run_store import Result, Results, Run
from experiments.study import WORK, Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from openmythos.train.run import Run as Training

SEEDS = (0, 1, 2, 3, 4)
RATES = (0.0015, 0.003, 0.006)  # Muon's; the demo's is the middle one
STEPS = 1200
WALKS = 512
EQUAL_ACCURACY = 0.9  # of the longest trained walks, held out, at the trained loops
SMOKE_ARMS = ("fixed_longest", "sampled_mixed", "on_the_way", "drawn_positions", "stack_training")


class DepthDial(Study):
    """Experiment 1."""

    number = 1
    fresh_seeds = (5, 6, 7)
    title = "The depth dial: more loops and longer walks than in training"

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        """See ``Study``."""
        if scale == "smoke":
            few = {"steps": 2, "walks": 4, "most_loops": 4, "rate": RATES[1]}
            return [Run(arm, 0, few) for arm in SMOKE_ARMS]
        found: list[Run] = []
        for arm, plan in ARMS.items():
            settings = {"steps": STEPS * plan.steps, "walks": WALKS, "most_loops": 32}
            found += tuned(done, arm, settings, RATES, _score).then(arm, settings, SEEDS)
        return found

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        """See ``Study``."""
        from experiments.depth_dial import grid

        trained = train(run, out)
        model, size = trained.model, run.settings["walks"]
        walks = trained.task.puzzle
        way = on_the_way(trained, run, out)
        found: dict[str, Any] = {
            "progress": lengths_learnt(trained, size),
            "by_step": way.by_step,
            "leaks": grid.leaks(walks),
        }
        if run.tuning:
            return found
        all_loops = loops_of(run)
        found |= grid.grid(model, walks, all_loops, size)
        found["equal_accuracy"] = way.at(
            EQUAL_ACCURACY, lambda early: grid.grid(early, walks, all_loops, size)
        )
        if run.arm in STACKS:
            found["twice"] = grid.twice(model, walks, size)
        else:
            row = found["accuracy"][TRAINED_HOPS - 1]
            fewest = next(n for n, a in zip(all_loops, row, strict=True) if a >= max(row) - 0.01)
            found["exits"] = grid.exits(model, walks, max(all_loops), size)
            found["falls"] = grid.falls(model, walks, TRAINED_HOPS, fewest, size)
        return found

    def conclude(self, results: Results) -> Conclusion:
        """See ``Study``."""
        from experiments.depth_dial.verdicts import conclude

        return conclude(self.claims, results)

    def draw(self, conclusion: Conclusion) -> "Mapping[str, Figure]":
        """See ``Study``."""
        from experiments.depth_dial.picture import draw

        return draw(conclusion)


def loops_of(run: Run) -> list[int]:
    """The loops at which the run's model is tested."""
    from experiments.depth_dial.grid import LOOPS

    return [1] if run.arm in STACKS else [n for n in LOOPS if n <= run.settings["most_loops"]]


def train(run: Run, out: Path) -> "Training":
    """The run's model, trained to its end in ``out``; what is there already is not done again."""
    found = training(run, out)
    if found.train().interrupted:
        raise KeyboardInterrupt
    return found


def checkpoint(arm: str, seed: int = 0, work: Path = WORK) -> Path:
    """The checkpoint of an arm's run, the small scale; trained again if it is not there."""
    run = next(r.run for r in STUDY.current("small")[1].of(arm) if r.run.seed == seed)
    found = train(run, STUDY.run_folder(run, "small", work)).folder.last_checkpoint()
    assert found is not None
    return found


def on_the_way(trained: "Training", run: Run, out: Path) -> Course:
    """Accuracy on the longest trained walks at every checkpoint; the first equal one is kept."""
    from openmythos.train.validation import puzzle_accuracy

    walks, loops, size = trained.task.puzzle, ARMS[run.arm].check_loops, run.settings["walks"]
    return course(
        trained,
        out,
        [EQUAL_ACCURACY],
        lambda model: puzzle_accuracy(model, walks, TRAINED_HOPS, loops, size, seed=3),
    )


def _score(result: Result) -> float:
    return float(result.data["progress"])


def lengths_learnt(trained: "Training", size: int) -> float:
    """Lengths that the curriculum has passed, plus the accuracy on the current one, held out."""
    from openmythos.train.validation import puzzle_accuracy

    walks, stage = trained.task.puzzle, trained.task.curriculum.stage
    loops = trained.config.data.check_loops
    accuracy = puzzle_accuracy(trained.model, walks, stage, loops, size, seed=2)
    return round(stage - 1 + accuracy, 4)


STUDY = DepthDial()

if __name__ == "__main__":
    main(STUDY)
