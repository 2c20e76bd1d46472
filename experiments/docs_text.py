"""Training on Python's documentation at a fixed number of loops, for the studies that do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.own_process import ROOT

if TYPE_CHECKING:
    from openmythos.config import ModelConfig
    from openmythos.data.loader import TokenLoader
    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.train.recipe import RunConfig

SEQ_LEN, ROWS = 256, 8


def source_of(scale: str) -> str:
    """The text of a scale: for smoke, this repository's pages."""
    return str(ROOT / "docs") if scale == "smoke" else "python-docs"


def sizes_of(arm: str) -> tuple[int, int]:
    """Width and recurrence of ``w96_r2``."""
    width, _, loops = arm.removeprefix("w").partition("_r")
    return int(width), int(loops)


def tiny(width: int, loops: int, core_layers: int = 1) -> ModelConfig:
    """Preset ``tiny`` at another width, number of loops and layers of the core."""
    from openmythos.config import presets

    preset = presets.preset("tiny")
    return replace(
        preset,
        d_model=width,
        num_loops=loops,
        num_core_layers=core_layers,
        attention=replace(preset.attention, head_dim=width // 4),
        feed_forward=preset.feed_forward.with_width(4 * width),
    )


def recipe(
    model: ModelConfig,
    seed: int,
    steps: int,
    rate: float,
    source: str,
    seq_len: int = SEQ_LEN,
    rows: int = ROWS,
) -> RunConfig:
    """A training that always runs the model's loops; ``rate`` is Muon's."""
    from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
    from openmythos.train.optim import OptimizerConfig
    from openmythos.train.recipe import RunConfig, TextData, TrainConfig

    train = TrainConfig(
        seed=seed,
        max_steps=steps,
        batch_size=rows,
        optimizer=OptimizerConfig(muon_lr=rate),
        depth=DepthSchedule(sampling=FixedDepth(mean_recurrence=model.num_loops)),
        eval_loops=(),
        save_every=50,
        keep_checkpoints=1,
    )
    return RunConfig(model=model, train=train, data=TextData(source=source, seq_len=seq_len))


def train_on_text(config: RunConfig, out: Path) -> tuple[RecurrentDepthLM, TokenLoader]:
    """The trained model, and the text that was held out.

    Raises:
        KeyboardInterrupt: The training was interrupted, and goes on from its checkpoint.
    """
    from openmythos.train.run import set_up
    from openmythos.train.task import TextTask

    trained = set_up(config, out / "model")
    if trained.train().interrupted:
        raise KeyboardInterrupt
    assert isinstance(trained.task, TextTask) and trained.task.validation is not None
    return trained.model, trained.task.validation
