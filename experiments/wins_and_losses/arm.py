"""The arms and tasks: k layers looped L times, k layers once, k L layers once, on three puzzles."""

from pathlib import Path
from typing import Any

import torch

from experiments.matching import Size
from openmythos.config import (
    CopyInitConfig,
    GQAConfig,
    ModelConfig,
    NoInjectionConfig,
    ReLUSquaredConfig,
)
from openmythos.data.induction import InductionConfig
from openmythos.data.packing import IGNORED_TARGET, on_device
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
        save_every=500,
        keep_checkpoints=1,
    )
    return RunConfig(model=model_config(arm, task), train=train, data=TASKS[task])


def train_and_measure(
    arm: str, task: str, seed: int, settings: dict[str, Any], out: Path
) -> dict[str, Any]:
    """What a trained model scores on held-out and on training examples.

    Raises:
        TrainingStopped: The run diverged.
    """
    config = recipe(arm, task, seed, settings["rate"], settings["steps"])
    run = set_up(config, out / "model")
    if run.train().interrupted:
        raise KeyboardInterrupt
    puzzle = make_puzzle(TASKS[task], seed)
    loops, count = ARMS[arm][1], settings["examples"]
    parts = {str(n): accuracies(run.model, puzzle, n, loops, count) for n in puzzle.train_sizes}
    held_out = [part["held_out"] for part in parts.values()]
    trained = [part["trained"] for part in parts.values()]
    return {
        "accuracy": sum(held_out) / len(held_out),
        "trained": sum(trained) / len(trained),
        "by_size": parts,
        "leaks": {str(n): puzzle.leak_baselines(n) for n in puzzle.train_sizes},
    }


def accuracies(
    model: RecurrentDepthLM, puzzle: Puzzle, num: int, loops: int, count: int
) -> dict[str, Any]:
    """Share of right targets of this size; of products also by place, the first left out."""
    found: dict[str, Any] = {}
    for name, batch in (
        ("held_out", puzzle.held_out_batch(num, count, seed=1)),
        ("trained", puzzle.sample_batch(0, num, count)),
    ):
        batch, ctx = on_device(model, batch)
        with inference(model):
            logits = model(batch.tokens, num_loops=loops, ctx=ctx).logits
        right = logits.argmax(dim=-1) == batch.targets
        if puzzle.kind == "products":
            found[f"{name}_by_place"] = right.float().mean(dim=0).tolist()
            right, counted = right[:, 1:], torch.ones_like(right[:, 1:])
        elif puzzle.kind == "induction":  # the last letter, whose answer needs all hops
            right, counted = right[:, -1:], torch.ones_like(right[:, -1:])
        else:
            counted = batch.targets != IGNORED_TARGET
        found[name] = float(right[counted].float().mean())
    return found
