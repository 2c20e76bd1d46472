"""What a model is, as data: one file per seam, mirroring ``openmythos.model``. No torch."""

from openmythos.config.attention import (
    AttentionConfig,
    DepthAttentionConfig,
    GQAConfig,
    MLAConfig,
    ValueEmbeddingConfig,
)
from openmythos.config.block import (
    BlockConfig,
)
from openmythos.config.feed_forward import (
    DenseConfig,
    FeedForwardConfig,
    MoEConfig,
    ReLUSquaredConfig,
    SwiGLUConfig,
)
from openmythos.config.halting import (
    ACTConfig,
    ExitGateConfig,
    HaltingConfig,
    PonderNetConfig,
    UniversalACTConfig,
)
from openmythos.config.injection import (
    AddInjectionConfig,
    GateInjectionConfig,
    InjectionConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    NoInjectionConfig,
    OriginalLTIInjectionConfig,
)
from openmythos.config.loop_signal import (
    LearnedLoopConfig,
    LoopAdapterConfig,
    LoopEmbeddingConfig,
    OutputLoRAConfig,
    SinusoidalLoopConfig,
    WeightLoRAConfig,
)
from openmythos.config.model import ModelConfig
from openmythos.config.rope import (
    Llama3ScalingConfig,
    RopeConfig,
)
from openmythos.config.state_init import (
    CopyInitConfig,
    NormalInitConfig,
    StateInitConfig,
    ZerosInitConfig,
)

__all__ = [
    "ACTConfig",
    "AddInjectionConfig",
    "AttentionConfig",
    "BlockConfig",
    "CopyInitConfig",
    "DenseConfig",
    "DepthAttentionConfig",
    "ExitGateConfig",
    "FeedForwardConfig",
    "GQAConfig",
    "GateInjectionConfig",
    "HaltingConfig",
    "InjectionConfig",
    "LTIInjectionConfig",
    "LearnedLoopConfig",
    "LinearInjectionConfig",
    "Llama3ScalingConfig",
    "LoopAdapterConfig",
    "LoopEmbeddingConfig",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "NoInjectionConfig",
    "NormalInitConfig",
    "OriginalLTIInjectionConfig",
    "OutputLoRAConfig",
    "PonderNetConfig",
    "ReLUSquaredConfig",
    "RopeConfig",
    "SinusoidalLoopConfig",
    "StateInitConfig",
    "SwiGLUConfig",
    "UniversalACTConfig",
    "ValueEmbeddingConfig",
    "WeightLoRAConfig",
    "ZerosInitConfig",
]
