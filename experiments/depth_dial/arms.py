"""The arms: models, curricula, objectives and positions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from experiments.equal_accuracy import keeping_checkpoints
from experiments.matching import Size
from experiments.run_store import Run
from openmythos.config import ModelConfig, RopeConfig
from openmythos.config.matched_baseline import Match, baseline
from openmythos.demo.walks import TRAINED_LOOPS, hops_config
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.objective import FinalLoopObjective, ObjectiveConfig, PerLoopObjective
from openmythos.train.recipe import RunConfig
from openmythos.train.run import Run as Training
from openmythos.train.run import set_up

TRAINED_HOPS = 8
FIXED_LOOPS = 4
TEST_LOOPS = 8  # twice the fixed depth, and the most that sampled depth draws
HOPS_PER_LOOP = 2  # what two layers do in a loop
POSITIONS = 64
SAVE_EVERY = 100  # steps between two checkpoints, at which equal training accuracy is looked for


LAST_LOOP = FinalLoopObjective()


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm.

    Attributes:
        says: In words.
        depth: Loops in training: always four, two to eight, or the depth of a plain stack.
        stack: What a plain stack matches, and at how many loops.
        mixed: Whether shorter walks than the longest are trained, too.
        objective: What the loss sees.
        passed_targets: Whether loops have the entities on the way as their targets.
        rope: Whether there are rotary positions; without, the causal mask alone orders the tokens.
        position_range: Positions are drawn from so many.
        steps: Of training, in units of the study's.
    """

    says: str
    depth: Literal["fixed", "sampled", "stack"] = "fixed"
    stack: tuple[Match, int] = ("parameters", FIXED_LOOPS)
    mixed: bool = False
    objective: ObjectiveConfig = LAST_LOOP
    passed_targets: bool = False
    rope: bool = False
    position_range: int | None = None
    steps: int = 1

    @property
    def check_loops(self) -> int:
        """Loops at which the curriculum asks whether a length is learnt: those of training."""
        return {"fixed": FIXED_LOOPS, "sampled": TRAINED_LOOPS[1], "stack": 1}[self.depth]


ALONG = PerLoopObjective(targets_per_loop=HOPS_PER_LOOP)
ARMS: Mapping[str, Arm] = {
    "fixed_longest": Arm(says="four loops, the longest walks only"),
    "fixed_mixed": Arm(says="four loops, mixed walks", mixed=True),
    "sampled_longest": Arm(says="two to eight loops, the longest walks only", depth="sampled"),
    "sampled_mixed": Arm(says="two to eight loops, mixed walks", depth="sampled", mixed=True),
    "every_loop": Arm(says="loss at every loop", objective=PerLoopObjective()),
    "on_the_way": Arm(
        says="each loop's target is the entity reached by then", objective=ALONG,
        passed_targets=True,
    ),
    "rope": Arm(says="rotary positions", rope=True),
    "drawn_positions": Arm(says="drawn rotary positions", rope=True, position_range=POSITIONS),
    "stack_parameters": Arm(says="plain stack of as many parameters", depth="stack"),
    "stack_training": Arm(
        says="plain stack of as many training FLOPs", depth="stack", stack=("flops", FIXED_LOOPS)
    ),
    "stack_test": Arm(
        says="plain stack of as many test FLOPs", depth="stack", stack=("flops", TEST_LOOPS)
    ),
    "stack_long": Arm(
        says="the same, three times the steps", depth="stack",
        stack=("flops", FIXED_LOOPS), steps=3,
    ),
    "stack_parameters_rope": Arm(
        says="plain stack of as many parameters, rotary positions", depth="stack", rope=True
    ),
    "stack_training_rope": Arm(
        says="plain stack of as many training FLOPs, rotary positions", depth="stack", rope=True,
        stack=("flops", FIXED_LOOPS),
    ),
}  # fmt: skip
MAIN = ("fixed_longest", "fixed_mixed", "sampled_longest", "sampled_mixed")
STACKS = tuple(name for name, arm in ARMS.items() if arm.depth == "stack")


def model_of(arm: Arm) -> ModelConfig:
    """The arm's model: the demo's on walks, or the plain stack that matches it."""
    looped = replace(hops_config(0, 1.0).model, rope=RopeConfig() if arm.rope else None)
    if arm.depth == "stack":
        match, loops = arm.stack
        return baseline(
            replace(looped, num_loops=loops), match=match, context_length=TRAINED_HOPS + 1
        ).config
    return replace(looped, num_loops=arm.check_loops)


def config_of(run: Run) -> RunConfig:
    """The training of a run."""
    arm, steps, rate = ARMS[run.arm], run.settings["steps"], run.settings["rate"]
    given = hops_config(run.seed, 1.0)
    fixed = DepthSchedule(sampling=FixedDepth(mean_recurrence=arm.check_loops))
    train = replace(
        given.train,
        max_seconds=None,
        max_steps=steps,
        # The demo's ratio of the two.
        optimizer=replace(given.train.optimizer, muon_lr=rate, lr=rate * 2 / 3),
        depth=given.train.depth if arm.depth == "sampled" else fixed,
        objective=arm.objective,
    )
    data = replace(
        given.data,
        max_train_hops=TRAINED_HOPS,
        check_loops=arm.check_loops,
        mixed=arm.mixed,
        passed_targets=arm.passed_targets,
        position_range=arm.position_range,
    )
    return RunConfig(model=model_of(arm), train=keeping_checkpoints(train, SAVE_EVERY), data=data)


def training(run: Run, out: Path) -> Training:
    """The run's training in its folder, done or not."""
    return set_up(config_of(run), out / "model")


def sizes() -> dict[str, Size]:
    """For the matching table: every arm's model, loops in training and at the test."""
    mean = float(hops_config(0, 1.0).train.depth.sampling.mean_recurrence)
    found = {}
    for name, arm in ARMS.items():
        looped = arm.depth != "stack"
        loops = {"fixed": float(FIXED_LOOPS), "sampled": mean, "stack": 1.0}[arm.depth]
        found[name] = Size(model_of(arm), loops, TEST_LOOPS if looped else 1)
    twice = replace(found["stack_training"], passes=2)
    return {**found, "stack_training, twice": twice}
