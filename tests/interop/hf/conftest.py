"""Exports of small models, opened by transformers: one import for all tests of this folder."""

import os
from collections.abc import Callable, Iterator
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
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The library, offline, with a folder of its own for the code that it copies."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers import dynamic_module_utils

    transformers.utils.logging.disable_progress_bar()
    before = dynamic_module_utils.HF_MODULES_CACHE
    dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    yield transformers
    dynamic_module_utils.HF_MODULES_CACHE = before


@pytest.fixture
def opened(transformers: ModuleType, tmp_path: Path) -> Open:
    """``opened(config)``: our random model, and its export as transformers opens it."""

    def opened(config: ModelConfig, **options: Any) -> Opened:
        model = random_model(config)
        folder = export_hf(model, tmp_path / "export")
        auto = transformers.AutoModelForCausalLM
        return model, auto.from_pretrained(folder, trust_remote_code=True, **options)

    return opened
