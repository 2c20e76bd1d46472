"""The arms: models with a halting head at several ponder costs, and models without one."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from experiments.equal_accuracy import keeping_checkpoints
from openmythos.config import ACTConfig, HaltingConfig, PonderNetConfig
from openmythos.config.schema import to_dict
from openmythos.demo.walks import hops_config
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.objective import (
    ExitWeightedObjective,
    FinalLoopObjective,
    ObjectiveConfig,
)
from openmythos.train.recipe import HopsData, RunConfig

MOST_LOOPS = 8  # of training, and the maximum that a halting head may take
TRAINED_HOPS = range(1, 9)
COSTS = (0.0, 0.01, 0.1, 1.0)  # of one loop, in nats
RATES = (0.5, 1.0, 2.0)  # times the learning rates of the demo's walks
STEPPING_LOOPS = 4
LEVEL = 0.9  # of what a run has learnt: what counts as equal training accuracy
SAVE_EVERY = 50  # steps between two checkpoints, at which equal training accuracy is looked for


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one arm changes in the demo's training on walks.

    Attributes:
        name: In results and tables.
        in_words: On the page.
        depth: Always ``MOST_LOOPS`` loops, between 2 and as many per walk, or always
            ``STEPPING_LOOPS``.
        halting: The head.
        objective: The loss.
        longest_only: Whether each stage of the curriculum trains its longest walks only.
    """

    name: str
    in_words: str
    depth: Literal["fixed", "variable", "stepping"]
    halting: HaltingConfig | None = None
    objective: ObjectiveConfig = field(default_factory=FinalLoopObjective)
    longest_only: bool = False

    @property
    def cost(self) -> float:
        """The ponder cost of a loop, in nats."""
        return getattr(self.objective, "ponder_weight", 0.0)

    def settings(self, steps: int, walks: int) -> dict[str, Any]:
        """Everything that determines a run but its seed and rate."""
        return {
            "depth": self.depth,
            "halting": None if self.halting is None else to_dict(self.halting),
            "objective": to_dict(self.objective),
            "longest_only": self.longest_only,
            "steps": steps,
            "walks": walks,
        }

    def config(self, seed: int, rate: float, steps: int) -> RunConfig:
        """The training run."""
        demo = hops_config(seed, seconds=1.0)
        schedule, loops = demo.train.depth, MOST_LOOPS
        if self.depth != "variable":
            loops = MOST_LOOPS if self.depth == "fixed" else STEPPING_LOOPS
            schedule = DepthSchedule(sampling=FixedDepth(mean_recurrence=loops))
        rates = demo.train.optimizer
        assert rates.muon_lr is not None
        train = replace(
            demo.train,
            max_seconds=None,
            max_steps=steps,
            optimizer=replace(rates, lr=rate * rates.lr, muon_lr=rate * rates.muon_lr),
            depth=schedule,
            objective=self.objective,
        )
        assert isinstance(demo.data, HopsData)
        data = replace(demo.data, check_loops=loops, mixed=not self.longest_only)
        return RunConfig(
            model=replace(demo.model, num_loops=loops, halting=self.halting),
            train=keeping_checkpoints(train, SAVE_EVERY),
            data=data,
        )


def _act(depth: Literal["fixed", "variable"], number: int) -> Arm:
    """ACT that begins at the most loops: the start that favours running all of them."""
    cost = COSTS[number]
    return Arm(
        name=f"act_{depth}_{number}",
        in_words=f"ACT, {depth} depth, " + (f"ponder cost {cost:g}" if cost else "no ponder cost"),
        depth=depth,
        halting=ACTConfig(bias_init=-3.0),
        objective=FinalLoopObjective(ponder_weight=cost),
    )


ACT_ARMS = {
    depth: [_act(depth, number) for number in range(len(COSTS))] for depth in ("fixed", "variable")
}
SHALLOW = Arm(  # begins at two loops: the start that favours a collapse
    name="act_variable_shallow",
    in_words="ACT, variable depth, no ponder cost, begins at two loops",
    depth="variable",
    halting=ACTConfig(bias_init=0.0),
)
PONDERNET = Arm(
    name="pondernet",
    in_words="PonderNet, fixed depth",
    depth="fixed",
    halting=PonderNetConfig(),
    objective=ExitWeightedObjective(kl_weight=0.01, prior_rate=0.2),
)
PLAIN = Arm(name="plain", in_words="no head, variable depth", depth="variable")
STEPPING = Arm(
    name="stepping",
    in_words="no head, four loops, longest walks only",
    depth="stepping",
    longest_only=True,
)
ARMS = {
    arm.name: arm
    for arm in (*ACT_ARMS["fixed"], *ACT_ARMS["variable"], SHALLOW, PONDERNET, PLAIN, STEPPING)
}
