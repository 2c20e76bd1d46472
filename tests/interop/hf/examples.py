"""Configurations that together cover what an export computes; and what both sides' tests share."""

from openmythos.config import (
    ACTConfig,
    AddInjectionConfig,
    BlockConfig,
    CopyInitConfig,
    ExitGateConfig,
    GateInjectionConfig,
    GQAConfig,
    LearnedLoopConfig,
    LinearInjectionConfig,
    Llama3ScalingConfig,
    ModelConfig,
    MoEConfig,
    NoInjectionConfig,
    NormalInitConfig,
    OriginalLTIInjectionConfig,
    OutputLoRAConfig,
    PonderNetConfig,
    ReLUSquaredConfig,
    RopeConfig,
    SinusoidalLoopConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
)
from tests.strategies import MLA, small_config

BIASED_MOE = MoEConfig(
    num_experts=4,
    num_experts_per_token=2,
    d_expert=8,
    num_shared_experts=2,
    d_shared=4,
    bias_loops=3,
)
SOFTMAX_MOE = MoEConfig(
    num_experts=4,
    num_experts_per_token=2,
    d_expert=8,
    num_shared_experts=0,
    scoring="softmax",
    routed_scale=1.5,
)
HUGINN = small_config(
    attention=GQAConfig(num_heads=4, num_kv_heads=4, head_dim=4, qk_bias=True),
    rope=RopeConfig(theta=50.0, interleaved=True),
    block=BlockConfig(norm="sandwich"),
    injection=LinearInjectionConfig(),
    state_init=NormalInitConfig(std=0.6),
    prelude_norm=False,
    readout="final_norm",
    embed_scale=4.0,
)
PARCAE = small_config(
    attention=GQAConfig(
        num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="weightless", qk_norm_eps=2.0**-3
    ),
    feed_forward=ReLUSquaredConfig(d_ff=12, scale=0.5),
    value_embedding=ValueEmbeddingConfig(layers=(0, 2, 3), gate_channels=8),
    readout="linear",
    tie_embeddings=False,
)
OURO = small_config(
    num_prelude_layers=0,
    num_coda_layers=0,
    block=BlockConfig(norm="peri"),
    injection=NoInjectionConfig(),
    loop_norm=True,
    final_norm=False,
    prelude_norm=False,
    halting=ExitGateConfig(),
    tie_embeddings=False,
)
ORIGINAL = small_config(
    num_core_layers=1,
    core_feed_forward=SOFTMAX_MOE,
    injection=OriginalLTIInjectionConfig(),
    state_init=CopyInitConfig(),
    loop_embedding=SinusoidalLoopConfig(num_channels=5),
    loop_adapter=OutputLoRAConfig(rank=2, num_loops=3),
    halting=ACTConfig(threshold=0.9, bias_init=0.0, keep_remainder=False),
    prelude_norm=False,
)
DENSE, LATENT = small_config(), small_config(attention=MLA)
SPARSE = small_config(core_feed_forward=BIASED_MOE)
CONFIGS: dict[str, ModelConfig] = {
    "dense": DENSE,
    "sparse": SPARSE,
    "huginn": HUGINN,
    "parcae": PARCAE,
    "ouro": OURO,
    "original": ORIGINAL,
    "act, layer scale, weighted qk-norm, no positions": small_config(
        attention=GQAConfig(num_heads=4, num_kv_heads=1, head_dim=6, qk_norm="weighted"),
        block=BlockConfig(norm="peri", layer_scale=0.1),
        rope=None,
        injection=AddInjectionConfig(),
        halting=ACTConfig(threshold=0.9, bias_init=0.0),
    ),
    "latent, gate, weight LoRA, learned loops": small_config(
        attention=MLA,
        feed_forward=ReLUSquaredConfig(d_ff=12, scale=0.5),
        injection=GateInjectionConfig(),
        loop_adapter=WeightLoRAConfig(rank=2, num_loops=3),
        loop_embedding=LearnedLoopConfig(num_loops=2),
        halting=PonderNetConfig(),
    ),
    "weight LoRA on qkv, SwiGLU and shared experts": small_config(
        loop_adapter=WeightLoRAConfig(rank=2, num_loops=3),
        core_feed_forward=BIASED_MOE,
    ),
    "weight LoRA on a dense core": small_config(
        loop_adapter=WeightLoRAConfig(rank=2, num_loops=6),
        max_seq_len=33,
        rope=RopeConfig(scaling=Llama3ScalingConfig(factor=4.0, original_max_seq_len=16)),
    ),
}
