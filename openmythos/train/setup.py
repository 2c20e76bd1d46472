"""The model of a run: its initial values, laid out over the ranks.

Over ranks no process ever holds the whole model. What is drawn is a function of seed, name and row,
so that each rank draws its own part, the same on any number of ranks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openmythos.checkpoint.load import empty_model, fill_model
from openmythos.checkpoint.weights import check_shapes, tensor_shapes
from openmythos.config import ModelConfig
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_pretrained
from openmythos.model.init import init_weights
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.train.parallel import Ranks, own_parts, parallelize
from openmythos.train.recipe import TrainConfig


class _DrawnOnMeta(TorchFunctionMode):
    """Parameters that constructors leave empty get no memory; constants keep their values."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def new_model(config: ModelConfig, train: TrainConfig, ranks: Ranks) -> RecurrentDepthLM:
    """A model with drawn weights, on this rank's device; over ranks, its part of one."""
    if ranks.mesh is None:
        return RecurrentDepthLM(config, train.seed).to(ranks.device)
    model = _laid_out(config, train, ranks)
    init_weights(model, config.d_model, train.seed, own_parts(model))
    return model


def initial_model(
    source: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    train: TrainConfig,
    ranks: Ranks,
) -> RecurrentDepthLM:
    """A model of this config with the weights of a checkpoint, in fp32.

    Raises:
        ValueError: The weights do not fit, or belong to another tokenizer.
    """
    folder = local_folder(source)
    if tokenizer is not None and (folder / "tokenizer.json").is_file():
        theirs = Tokenizer.load(folder).fingerprint
        if theirs != tokenizer.fingerprint:
            raise ValueError(
                f"tokenizer mismatch: {source} uses {theirs[:12]}, the data "
                f"{tokenizer.fingerprint[:12]}; prepare the data with --tokenizer {source}"
            )
    weights = load_pretrained(folder).state_dict()
    empty = empty_model(config)
    check_shapes(tensor_shapes(weights), tensor_shapes(empty.state_dict()), folder)
    if ranks.mesh is None:
        return fill_model(empty, weights.items(), folder, torch.float32, ranks.device)
    model = _laid_out(config, train, ranks)
    _fill_parts(model, weights)
    return model


def _laid_out(config: ModelConfig, train: TrainConfig, ranks: Ranks) -> RecurrentDepthLM:
    """This rank's part of a model; what is drawn has memory, and no values yet."""
    with _DrawnOnMeta():
        model = RecurrentDepthLM(config)
    parallelize(model, train, ranks)

    def with_memory(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device=ranks.device)
        return made if tensor.is_meta else made.copy_(tensor)

    with torch.no_grad():
        model._apply(with_memory)
    return model


@torch.no_grad()
def _fill_parts(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy this rank's part of every weight."""
    part_of = own_parts(model)
    for name, own in model.state_dict(keep_vars=True).items():
        part, rows, columns = part_of(name, own)
        whole = weights[name]
        part.copy_(whole.view(-1, whole.shape[-1])[rows][:, columns])
