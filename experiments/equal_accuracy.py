"""Arms at equal training accuracy: each run at its first checkpoint that reaches it.

At equal steps an arm that learns slowly is behind in everything that it has not learnt yet. Here
arms that know as much of what they are trained on are compared by the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.claim import Table
from openmythos.folder import remove_folder, write_json

if TYPE_CHECKING:
    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.train.recipe import TrainConfig
    from openmythos.train.run import Run as Training

RECORD = "equal_accuracy.json"


@dataclass(frozen=True)
class Course:
    """How a run came to what it knows.

    Attributes:
        by_step: Pairs of step and score, of every checkpoint.
        first: The first checkpoint that reaches each level; levels that none reached are left out.
    """

    by_step: list[tuple[int, float]]
    first: Mapping[float, Path]

    def at(
        self, level: float, measure: Callable[[RecurrentDepthLM], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """What the model of that checkpoint does, with its step; None if none reached the level."""
        from openmythos.interop.loading import load_pretrained

        if level not in self.first:
            return None
        found = self.first[level]
        return {"step": _step(found), **measure(load_pretrained(found))}


def keeping_checkpoints(train: TrainConfig, every: int) -> TrainConfig:
    """The same training with a checkpoint after so many steps each, all of them kept."""
    assert train.max_steps is not None
    return replace(train, save_every=every, keep_checkpoints=train.max_steps)


def course(
    trained: Training,
    out: Path,
    levels: Sequence[float],
    score: Callable[[RecurrentDepthLM], float],
) -> Course:
    """Score every checkpoint of a run that has ended, and keep those that are first at a level.

    Args:
        trained: Its training, with ``keeping_checkpoints``.
        out: The run's folder. What was found is written there before any checkpoint is deleted,
            because a kill may come in between.
        levels: The scores that count as equal.
        score: Of a model; higher is better.
    """
    from openmythos.interop.loading import load_pretrained

    path, every = out / RECORD, trained.config.train.save_every
    checkpoints = {_step(folder): folder for folder in trained.folder.checkpoints()}
    last = max(checkpoints)
    if not path.is_file():
        # A stop writes a checkpoint in between, which other runs do not have.
        steps = [step for step in sorted(checkpoints) if step % every == 0 or step == last]
        scores = [score(load_pretrained(checkpoints[step])) for step in steps]
        write_json(path, [[step, round(one, 4)] for step, one in zip(steps, scores, strict=True)])
    by_step = [(step, one) for step, one in json.loads(path.read_text(encoding="utf-8"))]
    first = {}
    for level in levels:
        reached = [step for step, one in by_step if one >= level]
        if reached:
            first[level] = checkpoints[reached[0]]
    kept = {checkpoints[last], *first.values()}
    for folder in checkpoints.values():
        if folder not in kept:
            remove_folder(folder)
    return Course(by_step, first)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def table(
    title: str,
    names: Sequence[str],
    header: Sequence[str],
    arms: Iterable[tuple[Sequence[str], Sequence[Mapping[str, Any] | None]]],
    shown: Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Iterable[str]],
) -> Table:
    """Arms at a level: how many of their runs reach it, at which step, and what they do there.

    Args:
        title: Of the table.
        names: The headings of what names a row.
        header: Those of what ``shown`` gives.
        arms: Per row its names, and what each run stores of the level: None if it is not reached.
        shown: The cells of a row, from its names and the runs that reach the level; those of a row
            without any stay empty.
    """
    rows = []
    for named, found in arms:
        early = [one for one in found if one is not None]
        step = f"{fmean(one['step'] for one in early):.0f}" if early else ""
        cells = list(shown(named, early)) if early else [""] * len(header)
        rows.append([*named, f"{len(early)} of {len(found)}", step, *cells])
    return Table(title, [*names, "reached by", "mean step", *header], rows)
