"""OpenMythos: recurrent-depth (looped) language models, built, trained, run, inspected and tested.

The public names are loaded on first use, so that ``openmythos --help`` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmythos.checkpoint.save import save_pretrained
    from openmythos.config import ModelConfig
    from openmythos.config.matched_baseline import baseline
    from openmythos.config.presets import preset
    from openmythos.engine.engine import Engine, EngineConfig
    from openmythos.engine.reference import generate
    from openmythos.engine.request import Request
    from openmythos.interop.loading import load_pretrained
    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.tokenizer import Tokenizer

__version__ = "0.2.0"

__all__ = [
    "Engine",
    "EngineConfig",
    "ModelConfig",
    "RecurrentDepthLM",
    "Request",
    "Tokenizer",
    "baseline",
    "generate",
    "load_pretrained",
    "preset",
    "save_pretrained",
]

_HOME = {
    "Engine": "openmythos.engine.engine",
    "EngineConfig": "openmythos.engine.engine",
    "ModelConfig": "openmythos.config",
    "RecurrentDepthLM": "openmythos.model.recurrent",
    "Request": "openmythos.engine.request",
    "Tokenizer": "openmythos.tokenizer",
    "baseline": "openmythos.config.matched_baseline",
    "generate": "openmythos.engine.reference",
    "load_pretrained": "openmythos.interop.loading",
    "preset": "openmythos.config.presets",
    "save_pretrained": "openmythos.checkpoint.save",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'openmythos' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
