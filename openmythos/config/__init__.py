"""The model's configuration: one file per seam, like ``openmythos.model``. Does not import torch.

A seam is a place where one of several implementations is chosen, such as attention or injection.
Each choice, a member of the seam, is a config class.
"""

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
    LoopScaleConfig,
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
    "LoopScaleConfig",
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
