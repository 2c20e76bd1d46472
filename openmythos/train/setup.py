"""The model of a run: its initial values, laid out over the ranks.

Over ranks no process ever holds the whole model. What is drawn is a function of seed, name and row,
so that each rank draws its own part, the same on any number of ranks.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openmythos.checkpoint.load import (
    checkpoint_damage,
    empty_model,
    fill_model,
    load_weights,
    read_config,
)
from openmythos.checkpoint.weights import check_shapes, tensor_shapes
from openmythos.config import ModelConfig
from openmythos.interop.adapter import draw_adapter, is_adapter
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_pretrained, open_foreign
from openmythos.model.adapter import base_tensors
from openmythos.model.init import init_weights
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import has_tokenizer
from openmythos.train.ranks import Ranks
from openmythos.train.recipe import TrainConfig
from openmythos.train.shard import own_parts, put_in_fused_order


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
    """A model of this config with the weights of a checkpoint, in fp32; over ranks, a part of it.

    Of one of our checkpoints each rank reads only its part, of another family's one tensor after
    the other, of which it keeps its part.

    Raises:
        ValueError: The weights do not fit, or belong to another tokenizer.
    """
    folder = local_folder(source)
    if tokenizer is None and has_tokenizer(folder):
        raise ValueError(
            f"{source} reads text, and a puzzle's tokens are no words of it: give text as --data, "
            "or a checkpoint that was trained on this puzzle"
        )
    if tokenizer is not None and (folder / "tokenizer.json").is_file():
        theirs = Tokenizer.load(folder).fingerprint
        if theirs != tokenizer.fingerprint:
            raise ValueError(
                f"tokenizer mismatch: {source} uses {theirs[:12]}, the data "
                f"{tokenizer.fingerprint[:12]}; prepare the data with --tokenizer {source}"
            )
    if ranks.mesh is None:
        weights = load_pretrained(folder).state_dict()
        empty = empty_model(config)
        check_shapes(tensor_shapes(weights), tensor_shapes(empty.state_dict()), folder)
        return fill_model(empty, weights.items(), folder, torch.float32, ranks.device)
    model = _laid_out(config, train, ranks)
    damaged = ranks.each(lambda: checkpoint_damage(folder, (ranks.rank, ranks.world)))
    if problem := next(filter(None, damaged), None):
        raise ValueError(f"{folder} is damaged: {problem}")
    if not is_adapter(folder) and "format" in read_config(folder):
        load_weights(model, folder)
        put_in_fused_order(model, model.state_dict())
        return model
    if is_adapter(folder):  # merged into its base, as a whole
        weights = load_pretrained(folder).state_dict()
        shapes, tensors = tensor_shapes(weights), iter(weights.items())
    else:
        empty, tensors = open_foreign(folder, torch.float32)
        shapes = tensor_shapes(empty.state_dict())
    ours = base_tensors(model)
    check_shapes(shapes, tensor_shapes(ours), folder)
    fill_parts(model, ours, tensors)
    return model


def _laid_out(config: ModelConfig, train: TrainConfig, ranks: Ranks) -> RecurrentDepthLM:
    """This rank's part of a model; what is drawn has memory, and no values yet."""
    with _DrawnOnMeta():
        model = RecurrentDepthLM(config)
    if train.adapter is not None:
        draw_adapter(model, train.adapter, train.seed)
    from openmythos.train.parallel import parallelize

    parallelize(model, train, ranks)

    def with_memory(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device=ranks.device)
        return made if tensor.is_meta else made.copy_(tensor)

    with torch.no_grad():
        model._apply(with_memory)
    return model


@torch.no_grad()
def fill_parts(
    model: nn.Module, own: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Copy this rank's part of every weight into the model's tensor of that name."""
    part_of = own_parts(model)
    for name, whole in weights:
        part, rows, columns = part_of(name, own[name])
        part.copy_(whole.view(-1, whole.shape[-1])[rows][:, columns])
