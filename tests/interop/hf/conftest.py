"""Exports of small models, opened by transformers: one import for all tests of this folder."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from openmythos.config import ModelConfig
from openmythos.interop.export import export_hf
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import random_model

Opened = tuple[RecurrentDepthLM, Any]
Open = Callable[..., Opened]


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The library, offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture
def opened(transformers: ModuleType, tmp_path: Path) -> Open:
    """``opened(config)``: our random model, and its export as transformers opens it."""

    def opened(config: ModelConfig, **options: Any) -> Opened:
        model = random_model(config)
        folder = export_hf(model, tmp_path / "export")
        auto = transformers.AutoModelForCausalLM
        return model, auto.from_pretrained(folder, trust_remote_code=True, **options)

    return opened
