"""Named model configurations: one function per preset, and one table of them. No torch.

The ``mythos-*`` models are within 2 % of the total parameters in their names; ``openmythos
presets`` lists exact and active counts. All sizes follow the same rules, so that they can be
compared:

- The core is a mixture of 224 to 384 small experts (``d_expert`` is a quarter to two fifths of
  ``d_model``). Each token uses 8 routed experts and 1 shared one of the same width. The active
  share falls from 16 % (1b, where the vocabulary alone is 7 %) to 4 % (1t).
- The core has 4 to 16 layers and is looped 8 times, the mean depth of Parcae's models: the
  effective depth is 36 layers at 1b and 136 at 1t. Prelude and coda are dense, 2 to 4 layers each.
- Attention is MLA. Every loop has its own cache, so the size of one layer's entry decides the
  memory: one latent and one rotary key for all heads (512 + 64 numbers as in DeepSeek-V2 and V3;
  256 + 32 at 1b).
- LTI injection (B is a full ``d_model`` x ``d_model`` matrix), h_0 = 0, and sigmoid routing with a
  balancing bias per loop, because an expert may be busy in one loop and idle in another.
- The vocabulary has 65,536 tokens up to 10b, 131,072 up to 100b, and 163,840 (Kimi K2's) above. The
  head is tied up to 50b, where a second table would be a noticeable share of the parameters.

The configurations of published models are in ``published``.

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
    """The configuration named ``name``.

    Raises:
        ValueError: There is no such preset; the message lists the nearest name and all others.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no preset {name!r}; {hint}allowed: {', '.join(PRESETS)}")
    return PRESETS[name]()


def tiny() -> ModelConfig:
    """A model that learns real text on a laptop in minutes, with a core of one layer.

    Its vocabulary gives about 4 bytes per token. The head is a third of the compute; it is untied,
    because a tied one learns more slowly in so few steps.
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
    """1B parameters; smaller heads and latent than the others, to suit ``d_model`` 1024."""
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
    """3B parameters; the head and latent sizes of the larger models, six core layers."""
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
    """10B parameters, of which less than 8 % are active; eight core layers."""
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
    """50B parameters; twice the width of ``mythos_10b`` with as many core layers."""
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
    """100B parameters; 384 experts, as in all larger models."""
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
    """500B parameters; twelve core layers rather than wider experts."""
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
    """1T parameters; sixteen core layers, an effective depth of 136 layers at 8 loops."""
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
    """Kimi K2's layer shapes with the 58 inner ones of its 61 layers as the core.

    Expert, head and vocabulary sizes are K2's, so that memory and communication plans for K2 apply.
    With 2 loops the effective depth is 119 layers, about twice K2's compute.

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
    """The settings common to the family; ``layers`` are those of prelude, core and coda."""
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
            routed_scale=routed_scale,  # DeepSeek-V3's scale: weights that sum to 1 are too small
            bias_loops=num_loops,
        ),
        max_seq_len=max_seq_len,
        rope=RopeConfig(theta=rope_theta),
        injection=LTIInjectionConfig(),
        state_init=ZerosInitConfig(),
        tie_embeddings=tie_embeddings,
    )
