"""Configurations of published models: one function per model; ``presets`` includes their table.

No torch. Each has exactly the parameter count of the published model; ``interop`` loads the
published weights.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from openmythos.config import (
    BlockConfig,
    CopyInitConfig,
    ExitGateConfig,
    GQAConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    ModelConfig,
    NoInjectionConfig,
    NormalInitConfig,
    ReLUSquaredConfig,
    RopeConfig,
    SwiGLUConfig,
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
    """Parcae's baseline without loops: ``num_layers`` core layers that run once.

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
    """The settings common to both; every second layer has value embeddings, from the second on."""
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
            qk_norm_eps=2.0**-23,  # float32's machine epsilon, for every dtype
        ),
        feed_forward=ReLUSquaredConfig(d_ff=4 * d_model, scale=0.5),
        max_seq_len=2048,
        rope=RopeConfig(theta=50_000.0, interleaved=True),
        block=BlockConfig(norm="pre", norm_eps=1e-5),
        value_embedding=ValueEmbeddingConfig(layers=tuple(range(1, sum(layers), 2))),
        **fields,
    )


def huginn_3_5b() -> ModelConfig:
    """Huginn-0125: 3,564,976,800 parameters.

    Source: Huginn (arXiv 2502.05171), section 3.1, and the config.json of huginn-0125.
    """
    return ModelConfig(
        vocab_size=65_536,
        d_model=5280,
        num_prelude_layers=2,
        num_core_layers=4,
        num_coda_layers=2,
        num_loops=32,
        attention=GQAConfig(num_heads=55, num_kv_heads=55, head_dim=96, qk_bias=True),
        feed_forward=SwiGLUConfig(d_ff=17_920),
        max_seq_len=4096,
        rope=RopeConfig(theta=50_000.0, interleaved=True),
        block=BlockConfig(norm="sandwich"),
        injection=LinearInjectionConfig(),
        state_init=NormalInitConfig(std=0.632455532033676),  # sqrt(2 / 5), rounded as Huginn does
        prelude_norm=False,
        readout="final_norm",
        embed_scale=5280**0.5,
    )


def ouro_1_4b() -> ModelConfig:
    """Ouro-1.4B: 1,434,652,673 parameters."""
    return _ouro(num_layers=24)


def ouro_2_6b() -> ModelConfig:
    """Ouro-2.6B, as 1.4B with twice as many layers: 2,667,974,657 parameters."""
    return _ouro(num_layers=48)


def _ouro(*, num_layers: int) -> ModelConfig:
    """The settings common to both; all layers belong to the core.

    Source: Ouro (arXiv 2510.25741), section 4, and the config.json of its checkpoints.
    """
    return ModelConfig(
        vocab_size=49_152,
        d_model=2048,
        num_prelude_layers=0,
        num_core_layers=num_layers,
        num_coda_layers=0,
        num_loops=4,
        attention=GQAConfig(num_heads=16, num_kv_heads=16, head_dim=128),
        feed_forward=SwiGLUConfig(d_ff=5632),
        max_seq_len=65_536,
        rope=RopeConfig(theta=1_000_000.0),
        block=BlockConfig(norm="peri"),
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
        halting=ExitGateConfig(),
        prelude_norm=False,
        loop_norm=True,
        final_norm=False,
        tie_embeddings=False,
    )


PUBLISHED: dict[str, Callable[[], ModelConfig]] = {
    "huginn-3.5b": huginn_3_5b,
    "parcae-140m": partial(parcae, d_model=768, num_layers=2),
    "parcae-370m": partial(parcae, d_model=1024, num_layers=4),
    "parcae-770m": partial(parcae, d_model=1280, num_layers=6),
    "parcae-1.3b": partial(parcae, d_model=1536, num_layers=8),
    "parcae-gpt-140m": partial(parcae_gpt, d_model=768, num_layers=6),
    "parcae-gpt-370m": partial(parcae_gpt, d_model=1024, num_layers=12),
    "parcae-gpt-770m": partial(parcae_gpt, d_model=1280, num_layers=18),
    "parcae-gpt-1.3b": partial(parcae_gpt, d_model=1536, num_layers=24),
    "ouro-1.4b": ouro_1_4b,
    "ouro-2.6b": ouro_2_6b,
}
