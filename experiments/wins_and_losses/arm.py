"""The arms and tasks: k layers looped L times, k layers once, k L layers once, on three puzzles."""

from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.equal_accuracy import course, keeping_checkpoints
from experiments.matching import Size, training_flops
from openmythos.config import (
    CopyInitConfig,
    GQAConfig,
    ModelConfig,
    NoInjectionConfig,
    ReLUSquaredConfig,
)
from openmythos.data.induction import InductionConfig
from openmythos.data.packing import IGNORED_TARGET, Batch, on_device
from openmythos.data.products import ProductsConfig
from openmythos.data.puzzle import Puzzle
from openmythos.data.puzzle_table import SeededConfig, make_puzzle
from openmythos.data.recall import FactsConfig
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import RunConfig, TrainConfig
from openmythos.train.run import set_up

LAYERS, LOOPS = 1, 6
ARMS = {"loop": (LAYERS, LOOPS), "shallow": (LAYERS, 1), "deep": (LAYERS * LOOPS, 1)}
TASKS: dict[str, SeededConfig] = {
    "facts": FactsConfig(num_subjects=512, num_relations=32, num_values=64),
    "products": ProductsConfig(max_train_factors=16),
    "induction": InductionConfig(num_letters=4, length=24, max_train_hops=3),
}
BATCH = {"facts": 512, "products": 64, "induction": 64}
D_MODEL = 64
SAVE_EVERY = 20  # steps between two checkpoints, at which equal training accuracy is looked for
# Accuracies on training examples that count as equal: the higher for those that get there.
LEVELS = {"facts": (0.5, 0.9), "products": (0.3, 0.5), "induction": (0.55, 0.95)}
LONGER = InductionConfig(num_letters=4, length=48, max_train_hops=3)
# Questions that are longer than those of training. (A fact has no length.)
BEYOND: dict[str, dict[str, tuple[SeededConfig, int]]] = {
    "facts": {},
    "products": {f"{n} factors": (TASKS["products"], n) for n in (24, 32)},
    "induction": {"3 hops over 48 letters": (LONGER, 3)},
}


def model_config(arm: str, task: str) -> ModelConfig:
    """Pre-norm layers; the state begins as the embedding, and nothing is injected."""
    layers, loops = ARMS[arm]
    data = TASKS[task]
    return ModelConfig(
        vocab_size=make_puzzle(data, 0).vocab_size,
        d_model=D_MODEL,
        num_prelude_layers=0,
        num_core_layers=layers,
        num_coda_layers=0,
        num_loops=loops,
        max_seq_len=64,
        attention=GQAConfig(num_heads=4, num_kv_heads=4, head_dim=16, qk_norm="weightless"),
        feed_forward=ReLUSquaredConfig(d_ff=4 * D_MODEL),
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
    )


def size(arm: str, task: str) -> Size:
    """For the table of matching."""
    loops = ARMS[arm][1]
    return Size(model_config(arm, task), training_loops=loops, test_loops=loops)


def recipe(arm: str, task: str, seed: int, rate: float, steps: int) -> RunConfig:
    """The blocks' matrices at ``rate``; all else as in the demo's walks."""
    optimizer = OptimizerConfig(
        lr=2e-3,
        embedding_lr=None,
        muon_lr=rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        warmup=0.03,
        decay=0.6,
    )
    depth = DepthSchedule(sampling=FixedDepth(mean_recurrence=ARMS[arm][1]))
    train = TrainConfig(
        seed=seed,
        max_steps=steps,
        batch_size=BATCH[task],
        optimizer=optimizer,
        depth=depth,
        eval_loops=(),
    )
    train = keeping_checkpoints(train, SAVE_EVERY)
    return RunConfig(model=model_config(arm, task), train=train, data=TASKS[task])


def flops_of_training(arm: str, task: str, steps: float, context: int) -> float:
    """All FLOPs of so many steps."""
    tokens = BATCH[task] * TASKS[task].seq_len
    return steps * tokens * training_flops(size(arm, task), context)


def train_and_measure(
    arm: str, task: str, seed: int, settings: dict[str, Any], tuning: bool, out: Path
) -> dict[str, Any]:
    """What a trained model scores on held-out and on training examples, and on larger ones.

    But for tuning also at the first checkpoint that reaches each of ``LEVELS``.

    Raises:
        TrainingStopped: The run diverged.
    """
    config = recipe(arm, task, seed, settings["rate"], settings["steps"])
    run = set_up(config, out / "model")
    if run.train().interrupted:
        raise KeyboardInterrupt
    puzzle, loops, count = make_puzzle(TASKS[task], seed), ARMS[arm][1], settings["examples"]

    def trained(model: RecurrentDepthLM) -> float:
        batches = (puzzle.sample_batch(0, n, count) for n in puzzle.train_sizes)
        return fmean(share_right(model, puzzle, batch, loops)[0] for batch in batches)

    def everything(model: RecurrentDepthLM) -> dict[str, Any]:
        parts = {str(n): accuracies(model, puzzle, n, loops, count) for n in puzzle.train_sizes}
        longer = {name: (make_puzzle(c, seed), n) for name, (c, n) in BEYOND[task].items()}
        return {
            "accuracy": fmean(part["held_out"] for part in parts.values()),
            "trained": fmean(part["trained"] for part in parts.values()),
            "by_size": parts,
            "beyond": {
                name: share_right(model, p, p.held_out_batch(n, count, seed=1), loops)[0]
                for name, (p, n) in longer.items()
            },
        }

    found = everything(run.model)
    found["leaks"] = {str(n): puzzle.leak_baselines(n) for n in puzzle.train_sizes}
    if tuning:
        return found
    way = course(run, out, LEVELS[task], trained)
    found["by_step"] = way.by_step
    found["equal_accuracy"] = {str(level): way.at(level, everything) for level in LEVELS[task]}
    return found


def accuracies(
    model: RecurrentDepthLM, puzzle: Puzzle, num: int, loops: int, count: int
) -> dict[str, Any]:
    """Share of right targets of this size, held out and trained; of products also by place."""
    found: dict[str, Any] = {}
    for name, batch in (
        ("held_out", puzzle.held_out_batch(num, count, seed=1)),
        ("trained", puzzle.sample_batch(0, num, count)),
    ):
        found[name], by_place = share_right(model, puzzle, batch, loops)
        if puzzle.kind == "products":
            found[f"{name}_by_place"] = by_place
    return found


def share_right(
    model: RecurrentDepthLM, puzzle: Puzzle, batch: Batch, loops: int
) -> tuple[float, list[float]]:
    """Share of right targets that need the task, and of all targets by place."""
    batch, ctx = on_device(model, batch)
    with inference(model):
        logits = model(batch.tokens, num_loops=loops, ctx=ctx).logits
    right = logits.argmax(dim=-1) == batch.targets
    counted = batch.targets != IGNORED_TARGET
    if puzzle.kind == "products":  # the first is what is read
        counted[:, 0] = False
    elif puzzle.kind == "induction":  # the last letter, whose answer needs all hops
        counted[:, :-1] = False
    return float(right[counted].float().mean()), right.float().mean(dim=0).tolist()
