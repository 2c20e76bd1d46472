"""A run's folder: its configuration and its checkpoints, each written atomically.

Training state is stored as safetensors and JSON, never as a pickle.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmythos.checkpoint.load import (
    NEEDED,
    checkpoint_damage,
    load_weights,
    newest_checkpoint,
    run_checkpoints,
)
from openmythos.checkpoint.parts import (
    OwnParts,
    laid_out_like,
    own_box,
    own_parts,
    rank_files,
    whole_values,
)
from openmythos.checkpoint.save import (
    OWN_FILES,
    require_stored,
    save_parts,
    save_tensors,
    save_weights,
    write_config,
)
from openmythos.checkpoint.weights import COMPILED, CONFIG_FILE, WEIGHTS_STEM, StoredTensors
from openmythos.config import ModelConfig
from openmythos.config.schema import from_dict, to_dict
from openmythos.data.puzzle import Puzzle
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
from openmythos.interop.adapter import Adapter, restore_adapter, save_adapter, trained
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.train.ranks import Ranks
from openmythos.train.recipe import FREE_FIELDS, PATH_FIELDS, RunConfig
from openmythos.train.shard import in_plain_order, put_in_fused_order
from openmythos.train.task import PuzzleTask, Task

SCORES_FILE, SCORES_PICTURE = "scores.json", "scores.png"  # before and after fine-tuning
STATE_TENSORS, STATE_RECORD = "training_state.safetensors", "training_state.json"

RUN_FILES = {
    *("config.json", "metrics.jsonl", "checkpoints", "samples", "data", "tensorboard"),
    *("report.html", SCORES_FILE, SCORES_PICTURE),
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

    ``first_nats``, ``bad_steps``, ``skipped`` and ``skipped_running`` are the state of the
    ``DivergenceGuard``. ``kernels`` are our kernels for CPUs that the run uses; None: those of the
    machine, as in older runs.
    """

    step: int
    seconds: float
    first_nats: float | None = None
    bad_steps: int = 0
    skipped: int = 0
    skipped_running: int = 0
    kernels: Sequence[str] | None = None


class RunFolder:
    """``config.json``, ``metrics.jsonl``, ``checkpoints/step-...`` and ``samples/`` of one run.

    Over ranks, all of them save and resume together; the folder must be the same for all.
    """

    def __init__(
        self,
        path: Path,
        keep: int = 2,
        tokenizer: Tokenizer | None = None,
        ranks: Ranks | None = None,
        in_background: bool = False,
    ) -> None:
        self.path, self.keep, self.tokenizer = path, keep, tokenizer
        self.in_background = in_background
        self.ranks = Ranks.alone() if ranks is None else ranks
        self.config: dict[str, Any] | None = None
        self.adapter: Adapter | None = None  # what the run trains instead of the weights
        self._writer: tuple[ThreadPoolExecutor, Ranks] | None = None
        self._saving: Future[None] | None = None
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
        wait: bool = True,
    ) -> Path:
        """Write a checkpoint atomically, then delete all but the newest ``keep``.

        Over ranks, each of them writes what it holds of the model and of the optimisers. Unless it
        is waited for, a folder that saves ``in_background`` copies everything to the host's memory
        and lets another thread write it while training goes on; see ``finish``.

        Raises:
            OSError: It cannot be written, by this rank or another; what was there before stays.
        """
        require_stored(model)
        adapter = self.adapter
        if adapter is None:
            weights = in_plain_order(model, model.state_dict())
        else:  # small, and one file in PEFT's format
            weights = {name: whole_values(tensor) for name, tensor in trained(model).items()}
        weights = {name.replace(COMPILED, ""): tensor for name, tensor in weights.items()}
        record = {"state": asdict(state), "task": task.state_dict()}
        if self.config is not None:
            record["run"] = self.config
        content = _Content(
            name=f"step-{state.step:08d}",
            weights=own_parts(weights),
            moments=own_parts(in_plain_order(model, _optimizer_state(model, optimizers))),
            record=record,
            model=model.config,
            adapter=adapter,
            puzzle=task.puzzle if isinstance(task, PuzzleTask) else None,
        )
        self.finish()
        if self.in_background and not wait:
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1), self.ranks.apart()
            thread, ranks = self._writer
            self._saving = thread.submit(self._write, content.copy(), ranks)
        else:
            self._write(content, self.ranks)
        return self.path / "checkpoints" / content.name

    def finish(self) -> bool:
        """Wait for the checkpoint that is written in the background.

        Returns:
            Whether it was written, or there is none; if it was not, that is said.
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except OSError as error:
            if self.ranks.first:
                warnings.warn(f"{error}; training goes on", stacklevel=2)
            return False
        return True

    def _write(self, content: "_Content", ranks: Ranks) -> None:
        target = self.path / "checkpoints" / content.name
        own = {*OWN_FILES, WALKS_FILE, PUZZLE_FILE, STATE_TENSORS, STATE_RECORD}
        own |= {path.name for path in target.glob("*-rank-*.safetensors")}
        with contextlib.ExitStack() as fresh_folder:
            enter = fresh_folder.enter_context
            fresh = Path(ranks.on_first(lambda: str(enter(replaced_folder(target, own)))))
            written = ranks.each(lambda: content.write_tensors(fresh, ranks))
            known = {name: record for each in written for name, record in each.items()}
            ranks.on_first(lambda: content.write_rest(fresh, self.tokenizer, known))
            ranks.each(fresh_folder.close)  # renames it
        ranks.on_first(self._remove_old)

    def _remove_old(self) -> None:
        for old in self.checkpoints()[: -self.keep]:
            remove_folder(old)

    def resume(
        self, model: RecurrentDepthLM, optimizers: list[torch.optim.Optimizer], task: Task
    ) -> RunState | None:
        """Load the newest checkpoint into model, optimisers and task; None if there is none.

        It may have been written by another number of ranks. Incomplete checkpoints, left by a
        killed process, are removed. Damaged ones are set aside under another name, each with a
        warning.

        Raises:
            ValueError: All checkpoints are damaged, or the training data has changed since.
        """
        ranks = self.ranks
        ranks.on_first(lambda: remove_unfinished(self.path / "checkpoints"))
        with contextlib.ExitStack() as quiet:
            if not ranks.first:  # one says it
                quiet.enter_context(warnings.catch_warnings(action="ignore"))
            needed = (*NEEDED, STATE_RECORD, STATE_TENSORS)
            folder = newest_checkpoint(self.path, needed, self._damage)
        if folder is None:
            return None
        if self.adapter is None:
            load_weights(model, folder)
        else:
            restore_adapter(model, self.adapter, folder)
        try:
            record = _read_json(folder / STATE_RECORD)
            state_file = folder / STATE_TENSORS
            is_whole = state_file.is_file()
            files = [state_file] if is_whole else rank_files(folder, state_file.stem)
            stored = StoredTensors(files)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} cannot be resumed: {in_a_sentence(error)}; delete it or the run"
            ) from None
        task.load_state_dict(record["task"])
        keys = {key: key for key in stored.shapes}
        if "optimizers" in record:  # older versions numbered the parameters
            keys = _named(model, optimizers, keys)
        _load_optimizer_state(model, optimizers, stored, keys)
        put_in_fused_order(model, model.state_dict() | _optimizer_state(model, optimizers))
        ranks.on_first(lambda: self._set_aside(folder))
        return RunState(**record["state"])

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint; the ranks look at its files together."""
        share = (self.ranks.rank, self.ranks.world)
        return next(filter(None, self.ranks.each(lambda: checkpoint_damage(folder, share))), None)

    def _set_aside(self, used: Path) -> None:
        """Rename the damaged checkpoints after the one that is used."""
        for damaged in self.checkpoints():
            if damaged > used:  # or it would be taken for the newest again
                aside = damaged.with_name(f"damaged-{damaged.name}")
                if aside.exists():
                    shutil.rmtree(aside)
                put_in_place(damaged, aside)


@dataclass(frozen=True)
class _Content:
    """What a checkpoint holds: this rank's parts of the tensors, and what the first rank writes."""

    name: str
    weights: OwnParts
    moments: OwnParts
    record: dict[str, Any]
    model: ModelConfig
    adapter: Adapter | None
    puzzle: Puzzle | None

    def copy(self) -> "_Content":
        """The same with copies of the tensors, on the host."""
        return replace(self, weights=self.weights.copy(), moments=self.moments.copy())

    def write_tensors(self, fresh: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
        """Write this rank's tensors; what the manifest says of its files, if they are parts."""
        if ranks.mesh is None:
            if self.adapter is None:
                save_weights(self.weights.values, fresh)
            else:
                save_adapter(self.weights.values, self.adapter, fresh)
            save_tensors(self.moments.values, fresh / STATE_TENSORS)
            return {}
        stem, known = Path(STATE_TENSORS).stem, {}
        if self.adapter is None:
            known = save_parts(self.weights, fresh, WEIGHTS_STEM, ranks.rank, ranks.world)
        elif ranks.first:
            save_adapter(self.weights.values, self.adapter, fresh)
        return known | save_parts(self.moments, fresh, stem, ranks.rank, ranks.world)

    def write_rest(
        self, fresh: Path, tokenizer: Tokenizer | None, known: dict[str, dict[str, Any]]
    ) -> None:
        """Write everything but the tensors, whose files the manifest knows; it comes last."""
        write_config(self.model, fresh, tokenizer)
        if self.puzzle is not None:
            self.puzzle.save(fresh)
        write_json(fresh / STATE_RECORD, self.record)
        write_manifest(fresh, known)


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


def _parameter_names(model: RecurrentDepthLM) -> dict[Tensor, str]:
    """The name of every parameter, also where a part of the model is compiled."""
    return {param: name.replace(COMPILED, "") for name, param in model.named_parameters()}


def _optimizer_state(
    model: RecurrentDepthLM, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The optimisers' tensors by the names of parameters: ``embed.weight.exp_avg``.

    Rates and the like are not among them: they follow from the configuration and the step.
    """
    names = _parameter_names(model)
    return {
        f"{names[param]}.{key}": value
        for optimizer in optimizers
        for param, values in optimizer.state.items()
        for key, value in values.items()
    }


def _load_optimizer_state(
    model: RecurrentDepthLM,
    optimizers: list[torch.optim.Optimizer],
    stored: StoredTensors,
    keys: dict[str, str],
) -> None:
    """Inverse of ``_optimizer_state``; what has a parameter's shape is laid out as it is.

    Args:
        model: The model that the parameters belong to.
        optimizers: The optimisers.
        stored: The tensors.
        keys: The name of each tensor in ``stored``, by that of ``_optimizer_state``.

    Raises:
        ValueError: A tensor belongs to no parameter.
    """
    left: dict[str, dict[str, str]] = {}
    for key, place in keys.items():
        name, _, part = key.rpartition(".")
        left.setdefault(name, {})[part] = place

    def read(param: Tensor, place: str) -> Tensor:
        if stored.shapes[place] != tuple(param.shape):
            return stored.read(place).clone()
        return laid_out_like(param, stored.read_part(place, own_box(param)).clone())

    names = _parameter_names(model)
    for optimizer in optimizers:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        state = {
            number: {part: read(param, place) for part, place in found.items()}
            for number, param in enumerate(params)
            if (found := left.pop(names[param], None)) is not None
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    if left:
        raise ValueError(f"the training state is of other parameters: {listed(sorted(left))}")


def _named(
    model: RecurrentDepthLM, optimizers: list[torch.optim.Optimizer], keys: Iterable[str]
) -> dict[str, str]:
    """The keys of older versions, ``OPTIMISER.NUMBER.exp_avg``, by those of today."""
    names = _parameter_names(model)
    params = [[p for group in opt.param_groups for p in group["params"]] for opt in optimizers]
    found = {}
    for key in keys:
        optimizer, number, part = key.split(".", 2)
        found[f"{names[params[int(optimizer)][int(number)]]}.{part}"] = key
    return found
