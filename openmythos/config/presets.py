"""Named model configurations: a function a preset, one table. No torch: the largest cost nothing.

The ``mythos-*`` models are within 2 % of the total parameters that their names say; ``openmythos
presets`` lists exact and active counts. One rule a choice, so that the sizes can be compared:

- The core is a mixture of 224 to 384 fine experts (``d_expert`` is a quarter to two fifths of
  ``d_model``): 8 routed and 1 shared of the same width run for a token. The active share falls from
  16 % (1b, where the vocabulary alone is 7 %) to 4 % (1t).
- A core has 4 to 16 layers, looped 8 times, the mean depth of Parcae's models: a token passes 36
  layers at 1b and 136 at 1t. Prelude and coda are dense, 2 to 4 layers each.
- Attention is MLA. Every loop caches, so what one layer caches decides the memory: one latent and
  one rotary key (512 + 64 numbers as in DeepSeek-V2 and V3; 256 + 32 at 1b) for all heads.
- LTI injection (its B is a full ``d_model`` x ``d_model`` matrix), h_0 = 0, sigmoid routing with a
  balancing bias for each loop: an expert may be busy in one loop and idle in another.
- Vocabularies are 65,536 to 10b, 131,072 to 100b, 163,840 (Kimi K2's) above. The head is tied up
  to 50b, where a second table would weigh, and has its own matrix above.

Published models are in ``published``.

Source: sizes after kyegomez/OpenMythos, open_mythos/variants.py; layer shapes after DeepSeek-V3
    (arXiv 2412.19437), section 4.2, and Kimi K2 (arXiv 2507.20534), section 2.3; loops after Parcae
    (arXiv 2604.12946), table 21.
"""

import difflib
from collections.abc import Callable

from openmythos.config import (
    GQAConfig,
    LTIInjectionConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    ReLUSquaredConfig,
    RopeConfig,
    SwiGLUConfig,
    ZerosInitConfig,
)
from openmythos.config.published import PUBLISHED

SMALL_VOCAB, MEDIUM_VOCAB, LARGE_VOCAB = 65_536, 131_072, 163_840


def preset(name: str) -> ModelConfig:
    """The configuration of that name.

    Raises:
        ValueError: No such preset; names the nearest and all others.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no preset {name!r}; {hint}allowed: {', '.join(PRESETS)}")
    return PRESETS[name]()


def tiny() -> ModelConfig:
    """Learns real text on a laptop in minutes: a one-layer core, a vocabulary for 4 bytes a token.

    The head is a third of its work; untied, because a tied table learns slower in so few steps.
    """
    return ModelConfig(
        vocab_size=4096,
        d_model=160,
        num_prelude_layers=1,
        num_core_layers=1,
        num_coda_layers=1,
        num_loops=4,
        attention=GQAConfig(num_heads=4, num_kv_heads=4, head_dim=40, qk_norm="weightless"),
        feed_forward=ReLUSquaredConfig(d_ff=640),
        max_seq_len=1024,
        injection=LTIInjectionConfig(),
        state_init=ZerosInitConfig(),
        tie_embeddings=False,
    )


def mythos_1b() -> ModelConfig:
    """Small heads and a small latent: at d_model 1024 the large ones would outweigh the stream."""
    return _mythos(
        d_model=1024,
        layers=(2, 4, 2),
        attention=MLAConfig(
            num_heads=16,
            q_lora_rank=512,
            kv_lora_rank=256,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
        ),
        d_ff=2816,
        num_experts=224,
        d_expert=320,
        vocab_size=SMALL_VOCAB,
        max_seq_len=4096,
        rope_theta=10_000.0,
    )


def mythos_3b() -> ModelConfig:
    """The latent of the large models, two more core layers."""
    return _mythos(
        d_model=1536,
        layers=(2, 6, 2),
        attention=_large_mla(num_heads=16, q_lora_rank=768),
        d_ff=4608,
        num_experts=256,
        d_expert=384,
        vocab_size=SMALL_VOCAB,
        max_seq_len=8192,
        rope_theta=500_000.0,
    )


def mythos_10b() -> ModelConfig:
    """Eight core layers; under 8 % active."""
    return _mythos(
        d_model=2048,
        layers=(2, 8, 2),
        attention=_large_mla(num_heads=16, q_lora_rank=1024),
        d_ff=5632,
        num_experts=256,
        d_expert=768,
        vocab_size=SMALL_VOCAB,
        max_seq_len=8192,
        rope_theta=500_000.0,
    )


def mythos_50b() -> ModelConfig:
    """Twice the width of the 10b at equal depth."""
    return _mythos(
        d_model=4096,
        layers=(3, 8, 3),
        attention=_large_mla(num_heads=32, q_lora_rank=1536),
        d_ff=11_008,
        num_experts=320,
        d_expert=1536,
        vocab_size=MEDIUM_VOCAB,
        max_seq_len=32_768,
        rope_theta=1_000_000.0,
    )


def mythos_100b() -> ModelConfig:
    """384 experts from here on."""
    return _mythos(
        d_model=5120,
        layers=(3, 8, 3),
        attention=_large_mla(num_heads=40, q_lora_rank=1536),
        d_ff=13_824,
        num_experts=384,
        d_expert=2048,
        vocab_size=MEDIUM_VOCAB,
        max_seq_len=32_768,
        rope_theta=1_000_000.0,
        tie_embeddings=False,
    )


def mythos_500b() -> ModelConfig:
    """More core layers instead of experts as wide as the stream."""
    return _mythos(
        d_model=9216,
        layers=(3, 12, 3),
        attention=_large_mla(num_heads=72, q_lora_rank=1536),
        d_ff=27_648,
        num_experts=384,
        d_expert=3840,
        vocab_size=LARGE_VOCAB,
        max_seq_len=131_072,
        rope_theta=1_000_000.0,
        tie_embeddings=False,
    )


def mythos_1t() -> ModelConfig:
    """Sixteen core layers of 384 experts; 136 layers deep at 8 loops."""
    return _mythos(
        d_model=12_288,
        layers=(4, 16, 4),
        attention=_large_mla(num_heads=96, q_lora_rank=1536),
        d_ff=36_864,
        num_experts=384,
        d_expert=4352,
        vocab_size=LARGE_VOCAB,
        max_seq_len=131_072,
        rope_theta=1_000_000.0,
        tie_embeddings=False,
    )


def kimi_scale_1t() -> ModelConfig:
    """Kimi K2's 61 layers with the 58 inner ones looped: the layer shapes of a real trillion.

    Expert, head and vocabulary sizes are K2's, so that memory and communication plans carry over.
    With as many layers of their own as K2 has, 2 loops double its compute: 119 layers deep.

    Source: Kimi K2 (arXiv 2507.20534), section 2.3; two more layers are dense here than there.
    """
    return _mythos(
        d_model=7168,
        layers=(2, 58, 1),
        attention=_large_mla(num_heads=64, q_lora_rank=1536),
        d_ff=18_432,
        num_experts=384,
        d_expert=2048,
        routed_scale=2.827,
        num_loops=2,
        vocab_size=LARGE_VOCAB,
        max_seq_len=131_072,
        rope_theta=50_000.0,
        tie_embeddings=False,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "mythos-1b": mythos_1b,
    "mythos-3b": mythos_3b,
    "mythos-10b": mythos_10b,
    "mythos-50b": mythos_50b,
    "mythos-100b": mythos_100b,
    "mythos-500b": mythos_500b,
    "mythos-1t": mythos_1t,
    "kimi-scale-1t": kimi_scale_1t,
    **PUBLISHED,
}


def _large_mla(*, num_heads: int, q_lora_rank: int) -> MLAConfig:
    """DeepSeek-V2's and V3's head and latent sizes."""
    return MLAConfig(
        num_heads=num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )


def _mythos(
    *,
    d_model: int,
    layers: tuple[int, int, int],
    attention: MLAConfig,
    d_ff: int,
    num_experts: int,
    d_expert: int,
    vocab_size: int,
    max_seq_len: int,
    rope_theta: float,
    num_loops: int = 8,
    routed_scale: float = 2.5,
    tie_embeddings: bool = True,
) -> ModelConfig:
    """What the family shares; ``layers`` are prelude, core, coda."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_prelude_layers=layers[0],
        num_core_layers=layers[1],
        num_coda_layers=layers[2],
        num_loops=num_loops,
        attention=attention,
        feed_forward=SwiGLUConfig(d_ff=d_ff),
        core_feed_forward=MoEConfig(
            num_experts=num_experts,
            num_experts_per_token=8,
            d_expert=d_expert,
            num_shared_experts=1,
            scoring="sigmoid",
            routed_scale=routed_scale,  # DeepSeek-V3's: weights normalised to 1 are too small
            bias_loops=num_loops,
        ),
        max_seq_len=max_seq_len,
        rope=RopeConfig(theta=rope_theta),
        injection=LTIInjectionConfig(),
        state_init=ZerosInitConfig(),
        tie_embeddings=tie_embeddings,
    )
