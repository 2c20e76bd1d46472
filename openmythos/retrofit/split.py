"""Convert a pretrained stack into prelude, core and coda; layers can be dropped.

Before training, the result at one loop computes exactly the kept layers run once.

Source: Retrofitting recurrence (arXiv 2511.07384), section 3; for the initial adapter [0 | I],
    LoopedLMs/retrofitting-recurrence, convert_olmo_loop_in_place.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from openmythos.checkpoint.load import empty_model, fill_model
from openmythos.config import (
    CopyInitConfig,
    LinearInjectionConfig,
    ModelConfig,
    StateInitConfig,
    ZerosInitConfig,
)
from openmythos.config.schema import require, shown, to_dict
from openmythos.model.recurrent import RecurrentDepthLM

# Stands for a path in errors about weights: the source is a model in memory.
WHERE = Path("the source")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The source's layers (from 0) in each part; the others are dropped.

    They must rise from part to part: layers are neither repeated nor reordered.
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
        """All kept layers, in order."""
        return (*self.prelude, *self.core, *self.coda)

    def dropped(self, num_layers: int) -> tuple[int, ...]:
        """The dropped layers of a stack of ``num_layers``."""
        return tuple(layer for layer in range(num_layers) if layer not in self.kept)


def check_stack(config: ModelConfig, layers: Layers) -> None:
    """Check that the source is a plain stack, as a loaded Llama is, and has these layers.

    Raises:
        ValueError: It is not; lists the fields that differ.
    """
    plain = replace(
        config.unlooped(),
        num_prelude_layers=0,
        num_coda_layers=0,
        core_feed_forward=None,
        value_embedding=None,
    )
    found, expected = to_dict(config), to_dict(plain)
    different = [
        f"{name} is {shown(found[name])}" for name in found if found[name] != expected[name]
    ]
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
    carry: float = 0.0,
) -> RecurrentDepthLM:
    """Convert a stack into prelude, core and coda with Huginn's injection x = W_h h + W_e p.

    p is the prelude's output. Initially W_h = 0 and W_e = I: the core's input is p for any h_0, so
    at every number of loops the model computes the kept layers run once. Training can turn on the
    recurrence through W_h, which gets a gradient from the second loop on (from the first only if
    h_0 is not zero).

    An adapter does not train W_h, and its loops would all do the same. With ``carry`` c, W_h = c I
    and W_e = I / (1 + c); then h_0 = W_e p gives the core p in the first loop, and every later loop
    reads c times the state before.

    Args:
        model: A plain stack, as ``load_pretrained`` returns for a Llama.
        layers: The layers of each part.
        num_loops: The default depth of the result.
        state_init: The initial state h_0; None: zeros.
        untie: Give the head its own copy of a tied embedding, as the published recipe does.
        carry: Share of the state that the next loop reads before training; needs h_0 = copy.

    Raises:
        ValueError: The model is not a plain stack, or has fewer layers, or ``carry`` is not such.
    """
    check_stack(model.config, layers)
    require(0 <= carry <= 1, "carry", carry, "in 0..1")
    is_copy = isinstance(state_init, CopyInitConfig)
    allowed = "0 unless h_0 is a copy (state_init): else one loop would not be the source"
    require(is_copy or carry == 0, "carry", carry, allowed)
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
    unit = torch.eye(config.d_model).to(embed)
    weights["injection.h_weight"] = carry * unit
    weights["injection.e_weight"] = unit / (1 + carry)
    if model.config.tie_embeddings and untie:
        weights["head.weight"] = embed.clone()
    return fill_model(empty_model(config), weights.items(), WHERE, None, embed.device)


def carried(model: RecurrentDepthLM, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """Copies of the kept layers' and shared weights, under their names in the result."""
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
