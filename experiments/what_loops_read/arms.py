"""The arms: models of the depth dial, and the same with a loop signal, experts or a coda."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from experiments.depth_dial import arms as dial
from experiments.run_store import Run
from openmythos.config import (
    CopyInitConfig,
    LearnedLoopConfig,
    ModelConfig,
    MoEConfig,
    NoInjectionConfig,
    SinusoidalLoopConfig,
    WeightLoRAConfig,
)
from openmythos.train.recipe import RunConfig

STACK_GROUPS = 4  # pairs of the stack's layers
TRAINED_HOPS, NEW_HOPS = dial.TRAINED_HOPS, 10

Change = Callable[[ModelConfig], ModelConfig]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm.

    Attributes:
        says: In words.
        dial: The arm of the depth dial whose training this is.
        change: What is changed about that arm's model; None: nothing, its trained models are read.
        trained: Whether it is trained at all.
    """

    says: str
    dial: str = "fixed_longest"
    change: Change | None = None
    trained: bool = True

    @property
    def is_stack(self) -> bool:
        """Whether groups of layers are read as loops."""
        return self.dial in dial.STACKS


def _lora(model: ModelConfig) -> ModelConfig:
    return replace(model, loop_adapter=WeightLoRAConfig(rank=4, num_loops=model.num_loops))


def _sinusoidal(model: ModelConfig) -> ModelConfig:
    return replace(model, loop_embedding=SinusoidalLoopConfig(num_channels=model.d_model))


def _learned(model: ModelConfig) -> ModelConfig:
    return replace(model, loop_embedding=LearnedLoopConfig(num_loops=model.num_loops))


def _experts(model: ModelConfig) -> ModelConfig:
    experts = MoEConfig(num_experts=8, num_experts_per_token=2, d_expert=64, num_shared_experts=1)
    return replace(model, core_feed_forward=experts)


def _coda(model: ModelConfig) -> ModelConfig:
    return replace(model, num_coda_layers=1)


def _no_injection(model: ModelConfig) -> ModelConfig:
    return replace(model, injection=NoInjectionConfig(), state_init=CopyInitConfig())


ARMS: Mapping[str, Arm] = {
    "fixed": Arm(says="four loops, the longest walks only"),
    "sampled": Arm(says="two to eight loops, mixed walks", dial="sampled_mixed"),
    "stack": Arm(says="plain stack: four pairs of layers", dial="stack_training_rope"),
    "lora": Arm(says="fixed, LoRA of each loop", change=_lora),
    "sinusoidal": Arm(says="fixed, sinusoids of the loop", change=_sinusoidal),
    "learned": Arm(says="fixed, a learned vector of each loop", change=_learned),
    "experts": Arm(says="fixed, eight experts, two and a shared one per token", change=_experts),
    "coda": Arm(says="fixed, a layer after the loop", change=_coda),
    "no_injection": Arm(
        says="sampled, the input is given once", dial="sampled_mixed", change=_no_injection
    ),
    "untrained": Arm(says="fixed, not trained", trained=False),
}
SIGNALS = ("lora", "sinusoidal", "learned")


def dial_run(run: Run) -> Run:
    """The depth dial's run whose training this run has, or would have without its change."""
    return Run(ARMS[run.arm].dial, run.seed, run.settings)


def config_of(run: Run) -> RunConfig:
    """The training of a run whose model is changed."""
    config, change = dial.config_of(dial_run(run)), ARMS[run.arm].change
    model = config.model if change is None else change(config.model)
    return replace(config, model=model)
