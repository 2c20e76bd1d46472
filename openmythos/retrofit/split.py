"""A pretrained stack as prelude, core and coda: layers are kept or dropped, the core can loop.

One loop of the result is exactly the kept layers run once, before any training.

Source: Retrofitting recurrence (arXiv 2511.07384), section 3; of the adapter's start [0 | I],
    LoopedLMs/retrofitting-recurrence, convert_olmo_loop_in_place.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from openmythos.checkpoint.load import empty_model, fill_model
from openmythos.config import (
    LinearInjectionConfig,
    ModelConfig,
    StateInitConfig,
    ZerosInitConfig,
)
from openmythos.config.schema import require, to_dict
from openmythos.model.recurrent import RecurrentDepthLM

# Named in errors about weights, which come from a model that is loaded.
WHERE = Path("the source")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The source's layers (from 0) that each part takes; the others are dropped.

    They keep their order: every layer stands once, after the ones before it.
    """

    prelude: tuple[int, ...] = ()
    core: tuple[int, ...]
    coda: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.core), "core", self.core, "at least one layer")
        rising = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        allowed = "rising layers, each once, as 0-3, then 10-17, then 18-21"
        require(rising and self.kept[0] >= 0, "prelude, core, coda", self.kept, allowed)

    @property
    def kept(self) -> tuple[int, ...]:
        """All of them, in order."""
        return (*self.prelude, *self.core, *self.coda)

    def dropped(self, num_layers: int) -> tuple[int, ...]:
        """The others of a stack of ``num_layers``."""
        return tuple(layer for layer in range(num_layers) if layer not in self.kept)


def check_stack(config: ModelConfig, layers: Layers) -> None:
    """Whether the source is a plain stack, as a Llama is loaded, that has these layers.

    Raises:
        ValueError: It is not; names the fields that differ.
    """
    plain = replace(
        config.unlooped(),
        num_prelude_layers=0,
        num_coda_layers=0,
        core_feed_forward=None,
        value_embedding=None,
    )
    found, expected = to_dict(config), to_dict(plain)
    different = [f"{name} is {found[name]!r}" for name in found if found[name] != expected[name]]
    if different:
        raise ValueError(
            f"the source is no plain stack that runs once, as a Llama is: {'; '.join(different)}"
        )
    last, most = layers.kept[-1], config.num_core_layers - 1
    require(last <= most, "the last layer", last, f"at most {most}, the source's last")


@torch.no_grad()
def retrofit(
    model: RecurrentDepthLM,
    layers: Layers,
    *,
    num_loops: int = 4,
    state_init: StateInitConfig | None = None,
    untie: bool = False,
) -> RecurrentDepthLM:
    """The stack as prelude, core and coda with Huginn's linear injection x = W_h h + W_e e.

    It starts at W_h = 0, W_e = 1: the core sees the prelude's output, whatever h_0 is, so every
    number of loops gives what the kept layers give. The loop comes in through W_h, whose gradient
    is not zero from the second loop on (with h_0 = 0 the first gives it none).

    Args:
        model: A plain stack, as ``load_pretrained`` gives for a Llama.
        layers: What each part takes.
        num_loops: The default depth of the result.
        state_init: h_0; None is zeros.
        untie: Give the head its own copy of a tied embedding, as the recipe does.

    Raises:
        ValueError: The model is no plain stack, or has fewer layers.
    """
    check_stack(model.config, layers)
    config = replace(
        model.config,
        num_prelude_layers=len(layers.prelude),
        num_core_layers=len(layers.core),
        num_coda_layers=len(layers.coda),
        num_loops=num_loops,
        injection=LinearInjectionConfig(),
        state_init=ZerosInitConfig() if state_init is None else state_init,
        tie_embeddings=model.config.tie_embeddings and not untie,
    )
    weights = dict(carried(model, layers))
    embed = model.embed.weight
    weights["injection.h_weight"] = embed.new_zeros(config.d_model, config.d_model)
    weights["injection.e_weight"] = torch.eye(config.d_model).to(embed)
    if model.config.tie_embeddings and untie:
        weights["head.weight"] = embed.clone()
    return fill_model(empty_model(config), weights.items(), WHERE, None, embed.device)


def carried(model: RecurrentDepthLM, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """Copies of the stack's weights under the names that the parts give them."""
    places = {
        layer: f"{stage}.{index}"
        for stage in ("prelude", "core", "coda")
        for index, layer in enumerate(getattr(layers, stage))
    }
    for name, tensor in model.state_dict().items():
        stage, _, rest = name.partition(".")
        if stage != "core":
            yield name, tensor.clone()
            continue
        number, _, leaf = rest.partition(".")
        if int(number) in places:
            yield f"{places[int(number)]}.{leaf}", tensor.clone()
