"""The model's configuration: one frozen dataclass, checked on construction. No torch.

The configurations of training and serving are defined beside their code.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from openmythos.config.attention import AttentionConfig, DepthAttentionConfig, ValueEmbeddingConfig
from openmythos.config.block import BlockConfig
from openmythos.config.feed_forward import DenseConfig, FeedForwardConfig
from openmythos.config.halting import HaltingConfig
from openmythos.config.injection import InjectionConfig, LTIInjectionConfig, NoInjectionConfig
from openmythos.config.loop_signal import LoopAdapterConfig, LoopEmbeddingConfig, WeightLoRAConfig
from openmythos.config.member import Member
from openmythos.config.rope import RopeConfig
from openmythos.config.schema import as_integer, require, require_literals, require_positive
from openmythos.config.state_init import CopyInitConfig, StateInitConfig, ZerosInitConfig

MAX_LOOPS = 1_000_000  # that a call may ask for; more is a mistake

# What ``ModelConfig.unlooped`` does with each field: those of the first list are kept; those of the
# second, which only a loop needs, are set to the value given there.
KEPT_UNLOOPED = (
    *("vocab_size", "d_model", "num_prelude_layers", "num_core_layers", "num_coda_layers"),
    *("attention", "feed_forward", "core_feed_forward", "max_seq_len", "rope", "block"),
    *("value_embedding", "final_norm", "embed_scale", "tie_embeddings"),
)
LOOP_ONLY: dict[str, Any] = {
    "num_loops": 1,
    "injection": NoInjectionConfig(),
    "state_init": CopyInitConfig(),
    "loop_embedding": None,
    "loop_adapter": None,
    "depth_attention": None,
    "halting": None,
    "prelude_norm": False,
    "loop_norm": False,
    "readout": "none",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A recurrent-depth language model: prelude -> core looped T times -> coda.

    Attributes:
        vocab_size: Token ids of the embedding. `train` sets it to the vocabulary of the data.
        d_model: Width of the state.
        num_prelude_layers: Layers before the loop, run once.
        num_core_layers: Layers of the loop, run at every loop with the same weights.
        num_coda_layers: Layers after the loop, run once.
        num_loops: Default depth; every call may choose another.
        attention: What a layer computes and caches of keys and values.
        feed_forward: The feed-forward of every layer.
        core_feed_forward: The feed-forward of the core's layers; null: as the others.
        max_seq_len: Longest sequence, in tokens.
        rope: Rotary positions; null: none.
        block: Where a layer applies its norms.
        injection: How the prelude's output e enters the state h at every loop.
        state_init: The state h_0 before the first loop.
        loop_embedding: A vector of the loop's index, added to the state; null: none.
        loop_adapter: How the core's weights differ from loop to loop; null: they do not.
        depth_attention: Attention of the core to the token's own earlier loops; null: none.
        halting: A head that learns when a token may stop; null: none.
        value_embedding: Token embeddings added to the values of some layers; null: none.
        prelude_norm: Whether the prelude's output is normalised.
        loop_norm: Whether the state is normalised after each loop (Ouro).
        readout: Between the last loop and the coda: nothing, a linear map (Parcae's C), or the
            final norm, which is then used twice (Huginn).
        final_norm: Whether the state is normalised before the head.
        embed_scale: Factor of the token embeddings.
        tie_embeddings: Whether the head uses the embedding's weights.
    """

    vocab_size: int
    d_model: int
    num_prelude_layers: int
    num_core_layers: int
    num_coda_layers: int
    num_loops: int
    attention: AttentionConfig
    feed_forward: DenseConfig
    core_feed_forward: FeedForwardConfig | None = None
    max_seq_len: int = 2048
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    block: BlockConfig = field(default_factory=BlockConfig)
    injection: InjectionConfig = field(default_factory=LTIInjectionConfig)
    state_init: StateInitConfig = field(default_factory=ZerosInitConfig)
    loop_embedding: LoopEmbeddingConfig | None = None
    loop_adapter: LoopAdapterConfig | None = None
    depth_attention: DepthAttentionConfig | None = None
    halting: HaltingConfig | None = None
    value_embedding: ValueEmbeddingConfig | None = None
    prelude_norm: bool = True
    loop_norm: bool = False
    readout: Literal["none", "linear", "final_norm"] = "none"
    final_norm: bool = True
    embed_scale: float = 1.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        names = ("vocab_size", "d_model", "num_core_layers", "num_loops", "max_seq_len")
        require_positive(self, *names)
        require_literals(self)
        require(self.num_loops <= MAX_LOOPS, "num_loops", self.num_loops, f"at most {MAX_LOOPS}")
        for name in ("num_prelude_layers", "num_coda_layers"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name), 0))
        if self.readout == "final_norm":
            require(self.final_norm, "final_norm", False, "true when readout is 'final_norm'")
        for part in vars(self).values():
            if isinstance(part, Member):
                part.check(self)

    @property
    def num_layers(self) -> int:
        """Layers with weights of their own."""
        return self.num_prelude_layers + self.num_core_layers + self.num_coda_layers

    @property
    def core_ff(self) -> FeedForwardConfig:
        """The feed-forward of the core's blocks."""
        return self.feed_forward if self.core_feed_forward is None else self.core_feed_forward

    @property
    def adds_e(self) -> bool:
        """Whether e is added at every loop; otherwise it enters through h_0 only."""
        return self.injection.adds_e

    @property
    def num_recent_loops(self) -> int:
        """Number of a token's own earlier loops that it attends to in the core."""
        return 0 if self.depth_attention is None else self.depth_attention.num_recent_loops

    def lora(self, stage: str) -> WeightLoRAConfig | None:
        """The LoRA of a stage's linear layers; only the core can have one."""
        adapter = self.loop_adapter
        return None if adapter is None or stage != "core" else adapter.core_lora

    def unlooped(self) -> "ModelConfig":
        """The config of the same model run once, without the parts that only a loop needs.

        If there is a loop norm but no final norm, a final norm is added: with one loop they are the
        same.
        """
        core = self.core_feed_forward
        return replace(
            self,
            core_feed_forward=None if core is None else core.unlooped(),
            final_norm=self.final_norm or self.loop_norm,
            **LOOP_ONLY,
        )

    def effective_depth(self, num_loops: int | None = None) -> int:
        """Number of layers applied to a token at ``num_loops`` loops (default: the config's)."""
        loops = self.num_loops if num_loops is None else num_loops
        return self.num_prelude_layers + loops * self.num_core_layers + self.num_coda_layers
