"""Training on Python's documentation, for the parts that do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.own_process import ROOT

if TYPE_CHECKING:
    from openmythos.data.loader import TokenLoader
    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.train.recipe import RunConfig


def source_of(scale: str) -> str:
    """The text of a scale: for smoke, this repository's pages."""
    return str(ROOT / "docs") if scale == "smoke" else "python-docs"


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
