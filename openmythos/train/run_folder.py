"""A run's folder: its configuration and its checkpoints, each written atomically.

Training state is stored as safetensors and JSON, never as a pickle.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openmythos.checkpoint.load import load_weights
from openmythos.checkpoint.save import OWN_FILES, write_checkpoint
from openmythos.folder import listed, remove_unfinished, replaced_folder, write_json
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.train.task import Task

STATE_TENSORS, STATE_RECORD = "training_state.safetensors", "training_state.json"

RUN_FILES = {"config.json", "metrics.jsonl", "checkpoints", "samples", "data", "tensorboard"}


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

    ``first_nats`` and ``bad_steps`` are the state of the ``DivergenceGuard``.
    """

    step: int
    seconds: float
    first_nats: float | None = None
    bad_steps: int = 0


class RunFolder:
    """``config.json``, ``metrics.jsonl``, ``checkpoints/step-...`` and ``samples/`` of one run."""

    def __init__(self, path: Path, keep: int = 2, tokenizer: Tokenizer | None = None) -> None:
        self.path, self.keep, self.tokenizer = path, keep, tokenizer
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (path / "samples").mkdir(exist_ok=True)

    def check_config(self, resolved: dict[str, Any], ignore: tuple[str, ...] = ()) -> bool:
        """Whether the folder has a configuration already; if so, it must equal this one.

        Args:
            resolved: The resolved configuration of this run.
            ignore: Dotted names of fields that are not compared.

        Raises:
            ValueError: The folder's configuration differs, or is not JSON.
        """
        target = self.path / "config.json"
        if not target.exists():
            return False
        try:
            old = _flatten(json.loads(target.read_text(encoding="utf-8")))
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(f"{target} is not JSON: {error}; choose another --out") from None
        new = _flatten(json.loads(json.dumps(resolved)))
        different = [
            f"{name} ({_shown(old, name)} there, {_shown(new, name)} here)"
            for name in {**old, **new}
            if _shown(old, name) != _shown(new, name) and name not in ignore
        ]
        if different:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {', '.join(different)}; "
                "choose another --out or delete the folder"
            )
        return True

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Write the resolved configuration, unless it is there; see ``check_config``."""
        if not self.check_config(resolved):
            write_json(self.path / "config.json", resolved)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-????????"))

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if any."""
        return max((self.path / "checkpoints").glob("step-????????"), default=None)

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
        with replaced_folder(target, {*OWN_FILES, STATE_TENSORS, STATE_RECORD}) as fresh:
            write_checkpoint(model, fresh, self.tokenizer)
            save_file(tensors, fresh / STATE_TENSORS)
            write_json(fresh / STATE_RECORD, record)
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def resume(
        self, model: RecurrentDepthLM, optimizers: list[torch.optim.Optimizer], task: Task
    ) -> RunState | None:
        """Load the newest checkpoint into model, optimisers and task; None if there is none.

        Incomplete checkpoints, left by a killed process, are removed.

        Raises:
            ValueError: The checkpoint is damaged, or the training data has changed since.
        """
        remove_unfinished(self.path / "checkpoints")
        folder = self.last_checkpoint()
        if folder is None:
            return None
        load_weights(model, folder)
        try:
            record = json.loads((folder / STATE_RECORD).read_text(encoding="utf-8"))
            tensors = load_file(folder / STATE_TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} cannot be resumed: {error}; delete it or the run") from None
        task.load_state_dict(record["task"])
        _unpack_optimizers(optimizers, tensors, record["optimizers"])
        return RunState(**record["state"])


def _flatten(config: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted names."""
    if not isinstance(config, dict):
        return {name: config}
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= _flatten(value, f"{name}.{key}" if name else key)
    return leaves


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
