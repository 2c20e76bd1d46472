"""An adapter that changes much, for the tests of what reads and writes adapters."""

from pathlib import Path
from typing import Any

import torch

from openmythos.config.adapter import AdapterConfig
from openmythos.interop.adapter import new_adapter, save_adapter
from openmythos.interop.adapter import trained as own_tensors
from openmythos.interop.loading import load_pretrained
from openmythos.model.adapter import changes_of
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import randomise


def trained(base: Path, folder: Path, **settings: Any) -> RecurrentDepthLM:
    """The base with an adapter that changes much; it is stored in the folder, too."""
    model = load_pretrained(base, dtype=torch.float32)
    config = AdapterConfig(**{"rank": 3, "alpha": 1.0, **settings})
    adapter = new_adapter(model, config, str(base), seed=1)
    for changes in changes_of(model).values():
        randomise(torch.nn.ModuleList(changes))
    folder.mkdir()
    save_adapter(own_tensors(model), adapter, folder)
    return model
