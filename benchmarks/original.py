"""The original OpenMythos (PyPI: open-mythos 0.5.0), and our model with the same weights."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from openmythos.checkpoint.load import empty_model, fill_model
from openmythos.interop.families.openmythos_original import read_config, rules
from openmythos.model.recurrent import RecurrentDepthLM

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / ".bench" / "open_mythos" / "main.py"
INSTALL = ".venv/bin/python -m pip install --no-deps --target .bench open-mythos==0.5.0"
ALL_LOOPS = -20.0  # a halting bias at which no token ever halts


def original_module() -> ModuleType:
    """The original's ``main.py``, loaded by path because the package imports transformers."""
    if not SOURCE.is_file():
        raise SystemExit(f"error: the original is not installed; run: {INSTALL}")
    spec = importlib.util.spec_from_file_location("open_mythos_main", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass needs this
    spec.loader.exec_module(module)
    return module


def make_pair(
    fields: dict[str, Any], halting_bias: float | None
) -> tuple[nn.Module, RecurrentDepthLM]:
    """The original with random weights, and ours with the same weights through ``interop``."""
    module = original_module()
    torch.manual_seed(0)
    config = module.MythosConfig(**fields)
    original = module.OpenMythos(config).eval()
    if halting_bias is not None:
        original.recurrent.act.halt.bias.data.fill_(halting_bias)
    ours = empty_model(read_config(dataclasses.asdict(config)))
    state = original.state_dict()
    found = {}
    for rule in rules(ours.config):
        if hasattr(rule, "read"):
            parts = rule.read([state[name] for name in rule.theirs])
            found.update(zip(rule.ours, parts, strict=True))
    return original, fill_model(ours, found.items(), SOURCE, torch.float32, "cpu")
