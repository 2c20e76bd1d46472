from pathlib import Path

import pytest

from openmythos.checkpoint.save import save_pretrained
from openmythos.model.recurrent import RecurrentDepthLM
from tests.checkpoint.examples import make_model, without_checksums


@pytest.fixture
def model() -> RecurrentDepthLM:
    return make_model(0)


@pytest.fixture
def folder(model: RecurrentDepthLM, tmp_path: Path) -> Path:
    """As versions before checksums wrote it: what a manifest would refuse is seen without one."""
    return without_checksums(save_pretrained(model, tmp_path / "saved"))
