"""Configurations of published models: a function a model, one table that ``presets`` merges.

No torch. Each has exactly the parameters of the published one; ``interop`` loads its weights.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from openmythos.config import (
    BlockConfig,
    CopyInitConfig,
    GQAConfig,
    LTIInjectionConfig,
    ModelConfig,
    NoInjectionConfig,
    NormalInitConfig,
    ReLUSquaredConfig,
    RopeConfig,
    ValueEmbeddingConfig,
)


def parcae(*, d_model: int, num_layers: int) -> ModelConfig:
    """Parcae with ``num_layers`` in each of prelude, core and coda; a random initial state.

    Source: Parcae (arXiv 2604.12946), table 19; sandyresearch/parcae at dee8363.
    """
    return _parcae(
        d_model=d_model,
        layers=(num_layers, num_layers, num_layers),
        num_loops=8,
        injection=LTIInjectionConfig(),
        state_init=NormalInitConfig(std=math.sqrt(2 / (5 * d_model))),
        prelude_norm=True,
        readout="linear",
    )


def parcae_gpt(*, d_model: int, num_layers: int) -> ModelConfig:
    """Parcae's baseline: as many layers of their own, all of them core and run once.

    Source: as ``parcae``.
    """
    return _parcae(
        d_model=d_model,
        layers=(0, num_layers, 0),
        num_loops=1,
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
        prelude_norm=False,
        readout="none",
    )


def _parcae(*, d_model: int, layers: tuple[int, int, int], **fields: Any) -> ModelConfig:
    """What both share; every second layer has value embeddings, the last too."""
    heads = d_model // 128
    return ModelConfig(
        vocab_size=32_768,
        d_model=d_model,
        num_prelude_layers=layers[0],
        num_core_layers=layers[1],
        num_coda_layers=layers[2],
        attention=GQAConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=128,
            qk_norm="weightless",
            qk_norm_eps=2.0**-23,  # that of float32, on every dtype
        ),
        feed_forward=ReLUSquaredConfig(d_ff=4 * d_model, scale=0.5),
        max_seq_len=2048,
        rope=RopeConfig(theta=50_000.0, interleaved=True),
        block=BlockConfig(norm="pre", norm_eps=1e-5),
        value_embedding=ValueEmbeddingConfig(layers=tuple(range(1, sum(layers), 2))),
        **fields,
    )


PUBLISHED: dict[str, Callable[[], ModelConfig]] = {
    "parcae-140m": partial(parcae, d_model=768, num_layers=2),
    "parcae-370m": partial(parcae, d_model=1024, num_layers=4),
    "parcae-770m": partial(parcae, d_model=1280, num_layers=6),
    "parcae-1.3b": partial(parcae, d_model=1536, num_layers=8),
    "parcae-gpt-140m": partial(parcae_gpt, d_model=768, num_layers=6),
    "parcae-gpt-370m": partial(parcae_gpt, d_model=1024, num_layers=12),
    "parcae-gpt-770m": partial(parcae_gpt, d_model=1280, num_layers=18),
    "parcae-gpt-1.3b": partial(parcae_gpt, d_model=1536, num_layers=24),
}
