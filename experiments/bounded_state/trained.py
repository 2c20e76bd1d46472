"""Small models trained with each injection: what they score, and how far their state goes."""

from pathlib import Path
from typing import Any

import torch

from experiments.bounded_state.fixed import INJECTIONS, bound, model_config, norms
from openmythos.data.packing import IGNORED_TARGET, on_device
from openmythos.data.products import Products, ProductsConfig
from openmythos.model.inference import inference
from openmythos.model.injection import LinearInjection
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.metrics import read_metrics
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import RunConfig, TrainConfig
from openmythos.train.run import Run as Training
from openmythos.train.run import set_up

FACTORS, D_MODEL, HELD_OUT = 4, 48, 512
FAR_LOOPS = 256  # where the state's norm is read


def recipe(kind: str, seed: int, settings: dict[str, Any]) -> RunConfig:
    """Products of four permutations, every matrix and vector at one AdamW rate."""
    loops = settings["train_loops"]
    optimizer = OptimizerConfig(
        lr=settings["rate"], embedding_lr=None, muon_lr=None, betas=(0.9, 0.98)
    )
    depth = DepthSchedule(sampling=FixedDepth(mean_recurrence=loops))
    train = TrainConfig(
        seed=seed,
        max_steps=settings["steps"],
        batch_size=64,
        optimizer=optimizer,
        depth=depth,
        eval_loops=(),
        save_every=0,
    )
    data = ProductsConfig(max_train_factors=FACTORS)
    model = model_config(INJECTIONS[kind], D_MODEL, loops, vocab_size=6)
    return RunConfig(model=model, train=train, data=data)


def train_and_measure(kind: str, seed: int, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the model of these settings scores, by loops, and where its state is.

    Raises:
        TrainingStopped: The run diverged.
    """
    run = set_up(recipe(kind, seed, settings), out / "model")
    if run.train().interrupted:
        raise KeyboardInterrupt
    return {**measured(run, settings["train_loops"]), "loss": last_loss(run)}


def measured(run: Training, train_loops: int) -> dict[str, Any]:
    """Accuracy at 1, 2 and 8 times the trained loops, norms, rho and the bound."""
    model = run.model
    puzzle = run.task.puzzle  # type: ignore[attr-defined]
    asked = [train_loops, 2 * train_loops, 8 * train_loops]
    far = sorted({*asked, FAR_LOOPS})
    return {
        "accuracy": {str(n): mean_accuracy(model, puzzle, n) for n in asked},
        "norms": dict(zip(map(str, far), norms(model, far), strict=True)),
        "rho": spectral_radius(model),
        "bound": bound(model),
        "leaks": puzzle.leak_baselines(FACTORS),
    }


def mean_accuracy(model: RecurrentDepthLM, puzzle: Products, num_loops: int) -> float:
    """Share of held-out positions, the first left out, whose product is the most likely token."""
    batch, ctx = on_device(model, puzzle.held_out_batch(FACTORS, HELD_OUT, seed=1))
    with inference(model):
        logits = model(batch.tokens, num_loops=num_loops, ctx=ctx).logits
    right = (logits.argmax(dim=-1) == batch.targets)[:, 1:]
    return float(right[batch.targets[:, 1:] != IGNORED_TARGET].float().mean())


def spectral_radius(model: RecurrentDepthLM) -> float | None:
    """Of the diagonal A, or of W_h of the linear injection; None where there is no matrix."""
    part = model.injection
    if isinstance(part, LinearInjection):
        return float(torch.linalg.eigvals(part.h_weight.detach().double()).abs().max())
    decay = part.decay()
    return None if decay is None else float(decay.detach().double().max())


def last_loss(run: Training) -> float:
    """Mean of the last five training losses that were logged."""
    rows = [r for r in read_metrics(run.folder.path / "metrics.jsonl") if r["kind"] == "train"]
    losses = [float(row["loss"]) for row in rows[-5:]]
    return sum(losses) / len(losses)
