"""A run's folder: its configuration and its checkpoints, each written atomically.

Training state is stored as safetensors and JSON, never as a pickle.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openmythos.checkpoint.load import NEEDED, load_weights, newest_checkpoint, run_checkpoints
from openmythos.checkpoint.save import OWN_FILES, save_tensors, write_checkpoint
from openmythos.checkpoint.weights import CONFIG_FILE
from openmythos.config.schema import from_dict, to_dict
from openmythos.folder import (
    PUZZLE_FILE,
    WALKS_FILE,
    in_a_sentence,
    listed,
    put_in_place,
    remove_folder,
    remove_unfinished,
    replaced_folder,
    write_json,
    write_manifest,
)
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.train.recipe import FREE_FIELDS, PATH_FIELDS, RunConfig
from openmythos.train.task import PuzzleTask, Task

STATE_TENSORS, STATE_RECORD = "training_state.safetensors", "training_state.json"

RUN_FILES = {
    *("config.json", "metrics.jsonl", "checkpoints", "samples", "data", "tensorboard"),
    "report.html",
}


def refuse_foreign(path: Path) -> None:
    """Check that a run in ``path`` would not be mixed with what is there.

    Hidden files do not count, nor does what somebody added to a run.

    Raises:
        ValueError: It is a file, or a folder with other files than a run's.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a run is a folder: choose another --out")
    if not path.is_dir() or all((path / name).is_dir() for name in ("checkpoints", "samples")):
        return
    names = (entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if foreign := sorted(set(names) - RUN_FILES):
        raise ValueError(
            f"{path} holds other files than a run's ({listed(foreign)}): choose a new or empty "
            f"folder as --out"
        )


@dataclass(frozen=True)
class RunState:
    """What resuming needs besides the states of model, optimisers and task.

    ``first_nats`` and ``bad_steps`` are the state of the ``DivergenceGuard``. ``kernels`` are our
    kernels for CPUs that the run uses; None: those of the machine, as in older runs.
    """

    step: int
    seconds: float
    first_nats: float | None = None
    bad_steps: int = 0
    kernels: Sequence[str] | None = None


class RunFolder:
    """``config.json``, ``metrics.jsonl``, ``checkpoints/step-...`` and ``samples/`` of one run."""

    def __init__(self, path: Path, keep: int = 2, tokenizer: Tokenizer | None = None) -> None:
        self.path, self.keep, self.tokenizer = path, keep, tokenizer
        self.config: dict[str, Any] | None = None
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (path / "samples").mkdir(exist_ok=True)

    def stored_config(self) -> dict[str, Any] | None:
        """The run's configuration, with defaults for the fields of later versions; None: none.

        Raises:
            ValueError: It is not JSON.
        """
        stored = read_run_config(self.path)
        try:
            return stored and to_dict(from_dict(RunConfig, stored))
        except ValueError:  # of another version: compared as it is
            return stored

    def changes(
        self, resolved: dict[str, Any], ignore: tuple[str, ...] = ()
    ) -> dict[str, tuple[str, str]]:
        """Fields in which a configuration differs from the folder's, each as (there, here).

        All of them are ``FREE_FIELDS``; paths are compared as the places that they lead to.

        Args:
            resolved: The resolved configuration of this run.
            ignore: Dotted names of fields that are not compared.

        Raises:
            ValueError: Other fields differ, or the folder's configuration is not JSON.
        """
        stored = self.stored_config()
        if stored is None:
            return {}
        old, new = _flatten(stored), _flatten(json.loads(json.dumps(resolved)))
        found = {
            name: (_shown(old, name), _shown(new, name))
            for name in {**old, **new}
            if _place(old, name) != _place(new, name) and name not in ignore
        }
        refused = [
            f"{n} ({a} there, {b} here)" for n, (a, b) in found.items() if n not in FREE_FIELDS
        ]
        if refused:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {', '.join(refused)}; "
                "choose another --out (--from with this run starts from its weights) or delete it"
            )
        return found

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Write the resolved configuration, unless the file holds it; see ``changes``."""
        self.config = resolved
        self.changes(resolved)
        target = self.path / CONFIG_FILE
        with contextlib.suppress(OSError, ValueError):
            if _read_json(target) == json.loads(json.dumps(resolved)):
                return
        write_json(target, resolved)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return run_checkpoints(self.path)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if any."""
        return max(self.checkpoints(), default=None)

    def last_state(self) -> "RunState | None":
        """How far the newest checkpoint is; None without one, or if that cannot be read."""
        folder = self.last_checkpoint()
        if folder is None:
            return None
        try:
            return RunState(**_read_json(folder / STATE_RECORD)["state"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def save(
        self,
        model: RecurrentDepthLM,
        optimizers: list[torch.optim.Optimizer],
        task: Task,
        state: RunState,
    ) -> Path:
        """Write a checkpoint atomically, then delete all but the newest ``keep``."""
        target = self.path / "checkpoints" / f"step-{state.step:08d}"
        tensors, plain = _pack_optimizers(optimizers)
        record = {"state": asdict(state), "optimizers": plain, "task": task.state_dict()}
        if self.config is not None:
            record["run"] = self.config
        own = {*OWN_FILES, WALKS_FILE, PUZZLE_FILE, STATE_TENSORS, STATE_RECORD}
        with replaced_folder(target, own) as fresh:
            write_checkpoint(model, fresh, self.tokenizer)
            if isinstance(task, PuzzleTask):
                task.puzzle.save(fresh)
            save_tensors(tensors, fresh / STATE_TENSORS)
            write_json(fresh / STATE_RECORD, record)
            write_manifest(fresh)
        for old in self.checkpoints()[: -self.keep]:
            remove_folder(old)
        return target

    def resume(
        self, model: RecurrentDepthLM, optimizers: list[torch.optim.Optimizer], task: Task
    ) -> RunState | None:
        """Load the newest checkpoint into model, optimisers and task; None if there is none.

        Incomplete checkpoints, left by a killed process, are removed. Damaged ones are set aside
        under another name, each with a warning.

        Raises:
            ValueError: All checkpoints are damaged, or the training data has changed since.
        """
        remove_unfinished(self.path / "checkpoints")
        folder = newest_checkpoint(self.path, (*NEEDED, STATE_RECORD, STATE_TENSORS))
        if folder is None:
            return None
        load_weights(model, folder)
        try:
            record = _read_json(folder / STATE_RECORD)
            tensors = load_file(folder / STATE_TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{folder} cannot be resumed: {in_a_sentence(error)}; delete it or the run"
            ) from None
        task.load_state_dict(record["task"])
        _unpack_optimizers(optimizers, tensors, record["optimizers"])
        for damaged in self.checkpoints():
            if damaged > folder:  # or it would be taken for the newest again
                aside = damaged.with_name(f"damaged-{damaged.name}")
                if aside.exists():
                    shutil.rmtree(aside)
                put_in_place(damaged, aside)
        return RunState(**record["state"])


def read_run_config(run: Path) -> dict[str, Any] | None:
    """The configuration of a run folder; None: there is none.

    It is the one that the newest intact checkpoint was written with, which has a checksum; before
    the first checkpoint, that in the run's config.json.

    Raises:
        ValueError: It is not JSON.
    """
    with warnings.catch_warnings(), contextlib.suppress(OSError, ValueError):
        warnings.simplefilter("ignore")  # who goes on to read the checkpoint is told of damage
        folder = newest_checkpoint(run, (*NEEDED, STATE_RECORD))
        stored = folder and _read_json(folder / STATE_RECORD).get("run")
        if stored:
            return stored
    target = run / CONFIG_FILE
    try:
        return _read_json(target) if target.exists() else None
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(
            f"{target} is not JSON: {error}; delete this file and run the same command again, or "
            "choose another --out"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _flatten(config: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, and of lists of them, by their dotted names."""
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        config = {str(number): item for number, item in enumerate(config)}
    if not isinstance(config, dict):
        return {name: config}
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= _flatten(value, f"{name}.{key}" if name else key)
    return leaves


def _place(leaves: dict[str, Any], name: str) -> str:
    """As ``_shown``; of a path, where it leads to."""
    path = leaves.get(name)
    field = re.sub(r"\.\d+\.", ".", name)  # of one item of a list
    return os.path.realpath(path) if field in PATH_FIELDS and path else _shown(leaves, name)


def _shown(leaves: dict[str, Any], name: str) -> str:
    return json.dumps(leaves[name]) if name in leaves else "absent"


def _pack_optimizers(
    optimizers: list[torch.optim.Optimizer],
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """State tensors under keys ``optimizer.parameter.name``; everything else ready for JSON."""
    tensors, plain = {}, []
    for number, optimizer in enumerate(optimizers):
        packed = optimizer.state_dict()
        for param, values in packed["state"].items():
            for name, value in values.items():
                tensors[f"{number}.{param}.{name}"] = value.contiguous()
        plain.append({"param_groups": packed["param_groups"]})
    return tensors, plain


def _unpack_optimizers(
    optimizers: list[torch.optim.Optimizer],
    tensors: dict[str, Tensor],
    plain: list[dict[str, Any]],
) -> None:
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, tensor in tensors.items():
        number, param, name = key.split(".", 2)
        states[int(number)].setdefault(int(param), {})[name] = tensor
    for optimizer, state, record in zip(optimizers, states, plain, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
