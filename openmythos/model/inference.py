"""The one place that switches a model to evaluation mode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its former mode again.

    ``modules`` are those of the model, for a caller that comes for every token: to find them again
    each time would take as long as a layer of a small model.
    """
    found = model.modules() if modules is None else modules
    training = [module for module in found if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
