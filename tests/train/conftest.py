from pathlib import Path

import pytest

from openmythos.data.prepare import prepare
from openmythos.tokenizer import byte_tokenizer
from tests.train.examples import write_text


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of made-up text. Read it only."""
    folder = tmp_path_factory.mktemp("text")
    prepare(str(write_text(folder)), folder / "data", tokenizer=byte_tokenizer())
    return folder / "data"
