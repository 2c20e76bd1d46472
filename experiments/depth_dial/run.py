"""The depth dial: trained on walks of at most eight hops, what happens beyond?"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Conclusion
from experiments.depth_dial.arms import ARMS, SAVE_EVERY, STACKS, TRAINED_HOPS, training
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
BY_STEP = "by_step.json"


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
        by_step = _by_step(trained, out, run)
        found: dict[str, Any] = {
            "progress": lengths_learnt(trained, size),
            "by_step": by_step["accuracy"],
            "leaks": grid.leaks(walks),
        }
        if run.tuning:
            return found
        all_loops = loops_of(run)
        found |= grid.grid(model, walks, all_loops, size)
        found["equal_accuracy"] = by_step["equal_accuracy"]
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


def _score(result: Result) -> float:
    return float(result.data["progress"])


def lengths_learnt(trained: "Training", size: int) -> float:
    """Lengths that the curriculum has passed, plus the accuracy on the current one, held out."""
    from openmythos.train.validation import puzzle_accuracy

    walks, stage = trained.task.puzzle, trained.task.curriculum.stage
    loops = trained.config.data.check_loops
    accuracy = puzzle_accuracy(trained.model, walks, stage, loops, size, seed=2)
    return round(stage - 1 + accuracy, 4)


def _by_step(trained: "Training", out: Path, run: Run) -> dict[str, Any]:
    """Accuracy on the longest trained walks at every checkpoint, and the grid at the first equal.

    Stored before all checkpoints but the last are deleted, because a kill may come in between.
    """
    from experiments.depth_dial import grid
    from openmythos.folder import remove_folder, write_json
    from openmythos.interop.loading import load_pretrained
    from openmythos.train.validation import puzzle_accuracy

    path, walks = out / BY_STEP, trained.task.puzzle
    loops, size = ARMS[run.arm].check_loops, run.settings["walks"]
    checkpoints = trained.folder.checkpoints()
    steps = {path: int(path.name.rpartition("-")[2]) for path in checkpoints}
    if not path.is_file():
        found: dict[str, Any] = {"accuracy": [], "equal_accuracy": None}
        for checkpoint, step in steps.items():
            if step % SAVE_EVERY and step != max(steps.values()):
                continue  # written by a stop in between
            model = load_pretrained(checkpoint)
            accuracy = puzzle_accuracy(model, walks, TRAINED_HOPS, loops, size, seed=3)
            found["accuracy"].append([step, round(accuracy, 4)])
            if accuracy >= EQUAL_ACCURACY and found["equal_accuracy"] is None:
                early = grid.grid(model, walks, loops_of(run), size)
                found["equal_accuracy"] = {"step": step, **early}
        write_json(path, found)
    for checkpoint in checkpoints[:-1]:
        remove_folder(checkpoint)
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored


STUDY = DepthDial()

if __name__ == "__main__":
    main(STUDY)
