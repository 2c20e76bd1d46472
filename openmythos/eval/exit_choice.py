"""``exit.json`` beside a checkpoint: the depth and exit rule that were measured to be worth it."""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from openmythos.checkpoint.save import EXIT_FILE
from openmythos.config.schema import as_integer, json_ready, require, to_dict
from openmythos.eval.calibration import Frontier, Point
from openmythos.folder import write_json
from openmythos.model.exit import Rule, make_exit_rule

VERSION = 1


@dataclass(frozen=True)
class ExitChoice:
    """What requests get that ask for no depth and no rule.

    Attributes:
        num_loops: The most loops per token.
        exit_rule: Stops tokens earlier; None: nothing does.
        processor: On which it was measured.
    """

    num_loops: int
    exit_rule: Rule | None
    processor: str

    def __str__(self) -> str:
        loops = f"{self.num_loops} loop{'s' if self.num_loops > 1 else ''} per token"
        return loops if self.exit_rule is None else f"up to {loops}, exit rule {self.exit_rule}"


def read_choice(folder: Path) -> ExitChoice | None:
    """The choice in a checkpoint's folder; None if there is none.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / EXIT_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        require(stored["version"] == VERSION, "version", stored["version"], str(VERSION))
        loops = as_integer("num_loops", stored["num_loops"], 1)
        rule = stored["exit_rule"] and make_exit_rule(**stored["exit_rule"])
        processor = stored["processor"]
        require(isinstance(processor, str), "processor", processor, "a name")
    except (ValueError, TypeError, KeyError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} cannot be used: {said}; delete it, or run openmythos calibrate-exit again"
        ) from None
    return ExitChoice(loops, rule, processor)


def write_choice(found: Frontier, path: Path, processor: str, settings: dict[str, Any]) -> None:
    """Write the choice, its quality and all that was measured."""
    chosen = found.chosen
    record = {
        "version": VERSION,
        "num_loops": chosen.setting.num_loops,
        "exit_rule": _rule(chosen),
        "processor": processor,
        "metric": found.metric,
        "within": found.within,
        "settings": settings,
        "chosen": _point(chosen, found),
        "shallowest_fixed": _point(found.fixed, found),
        "best_fixed": _point(found.best, found),
        "points": [_point(point, found) for point in found.points],
    }
    write_json(path, json_ready(record))


def _rule(point: Point) -> dict[str, Any] | None:
    rule = point.setting.exit_rule
    return None if rule is None else to_dict(rule)


def _point(point: Point, found: Frontier) -> dict[str, Any]:
    return {
        "num_loops": point.setting.num_loops,
        "exit_rule": _rule(point),
        "quality": asdict(point.score),
        "loss": asdict(found.loss(point)),
        "tokens_per_s": found.tokens_per_s(point),
        "mean_loops": point.mean_loops,
    }


def processor_name(device: torch.device) -> str:
    """The name of the processor, or of the accelerator, that a model runs on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    known = names[0] if names else platform.processor() or platform.machine()
    return known if device.type == "cpu" else f"{known} ({device.type})"
