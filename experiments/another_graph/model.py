"""The fine-tuning of zoo:walks on another graph, and the accuracy over hops and loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.another_graph.verdicts import BEFORE
from experiments.depth_dial import arms as dial
from experiments.depth_dial import grid
from experiments.run_store import Run
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.interop.loading import load_config, load_pretrained

if TYPE_CHECKING:
    from openmythos.train.recipe import RunConfig

BASE = "zoo:walks"
BASE_GRAPH = 0  # the seed of the graph that it knows

# Arms of the depth dial, whose settings they have, all but the start.
ARMS: Mapping[str, str] = {
    "sampled": "sampled_mixed",
    "fixed": "fixed_mixed",
    "fixed_longest": "fixed_longest",
}


def config_of(run: Run) -> RunConfig:
    """The depth dial's training of this arm and seed, from the base's weights."""
    given = dial.config_of(Run(ARMS[run.arm], run.seed, run.settings))
    train = replace(given.train, init_from=BASE, keep_checkpoints=1)
    # The number of loops that a model is run with if nobody says it is no part of the weights.
    return replace(given, train=train, model=load_config(BASE))


def measure(run: Run, out: Path) -> dict[str, Any]:
    """Accuracy by hops and loops on the new graph and on the old one.

    Raises:
        KeyboardInterrupt: The training was stopped.
    """
    from openmythos.train.run import set_up

    size, most = run.settings["walks"], run.settings["most_loops"]
    loops = [n for n in grid.LOOPS if n <= most]
    new, old = (Walks(HopsConfig(seed=graph)) for graph in (run.seed, BASE_GRAPH))
    if run.arm == BEFORE:
        model = load_pretrained(BASE)
    else:
        trained = set_up(config_of(run), out / "model")
        if trained.train().interrupted:
            raise KeyboardInterrupt
        model = trained.model
    found = {"new": grid.grid(model, new, loops, size), "leaks": grid.leaks(new)}
    return found | {"old": grid.grid(model, old, loops, size)}
