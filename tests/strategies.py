"""Random small models over all seams, for property tests; and one plain small model."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import jaxtyping
import torch
from hypothesis import strategies as st

from openmythos import config as configs
from openmythos.config import (
    CopyInitConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    SwiGLUConfig,
)
from openmythos.config.schema import from_dict
from openmythos.model.recurrent import RecurrentDepthLM

GQA = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=4)
MLA = MLAConfig(
    num_heads=2,
    q_lora_rank=6,
    kv_lora_rank=5,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=3,
)
MOE = MoEConfig(num_experts=4, num_experts_per_token=2, d_expert=8)


def small_config(**changes: Any) -> ModelConfig:
    """One prelude, two core and one coda layer of width 16; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "vocab_size": 32,
        "d_model": 16,
        "num_prelude_layers": 1,
        "num_core_layers": 2,
        "num_coda_layers": 1,
        "num_loops": 4,
        "max_seq_len": 64,
        "attention": GQA,
        "feed_forward": SwiGLUConfig(d_ff=24),
    }
    if "injection" in changes and not changes["injection"].adds_e:
        fields["state_init"] = CopyInitConfig()  # the only way in for the tokens
    return ModelConfig(**{**fields, **changes})


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the tests' type checker: what a user meets, and what dynamo can trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter away from its initial value, so that no path is multiplied by zero."""
    generator = seeded(seed)
    tensors = list(model.parameters()) + [b for n, b in model.named_buffers() if n.endswith("bias")]
    for tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.ndim < 2:
            tensor.copy_(tensor + 0.3 * noise)
        else:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)


def random_model(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> RecurrentDepthLM:
    """A model in eval mode whose parameters are all random."""
    model = RecurrentDepthLM(config, seed)
    randomise(model, seed)
    return model.to(dtype).eval()


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=seeded(seed))


# --- the members of the seams --------------------------------------------------------------------

Json = dict[str, Any]


def parts_of(hint: Any) -> tuple[type, ...]:
    """The config classes that a type allows: of a seam all of its members."""
    allowed = typing.get_args(hint) or (hint,)
    return tuple(part for part in allowed if dataclasses.is_dataclass(part))


# By the fields of the model's config. A union names its members once; the model's tables hold them.
SEAMS: dict[str, tuple[type, ...]] = {
    field: parts
    for field, hint in typing.get_type_hints(ModelConfig).items()
    if (parts := parts_of(hint))
}

# What fields may be in an example; the others have their defaults. A member that has them all needs
# no row.
EXAMPLES: dict[type, dict[str, Sequence[Any]]] = {
    configs.GQAConfig: {
        "num_heads": [4],
        "num_kv_heads": [1, 2, 4],
        "head_dim": [2, 4],
        "qk_norm": ["none", "weightless", "weighted"],
        "qk_norm_eps": [None, 1e-3],
        "qk_bias": [False, True],
    },
    configs.MLAConfig: {
        "num_heads": [1, 3],
        "q_lora_rank": [5],
        "kv_lora_rank": [3, 6],
        "qk_nope_head_dim": [3],
        "qk_rope_head_dim": [2, 4],
        "v_head_dim": [2, 5],
    },
    configs.SwiGLUConfig: {"d_ff": [12]},
    configs.ReLUSquaredConfig: {"d_ff": [10], "scale": [1.0, 0.5]},
    configs.MoEConfig: {
        "num_experts": [4],
        "num_experts_per_token": [1, 2, 4],
        "d_expert": [4, 5],
        "num_shared_experts": [0, 1, 2],
        "d_shared": [None, 3],
        "scoring": ["sigmoid", "softmax"],
        "routed_scale": [1.0, 1.5],
        "bias_loops": [1, 3],
    },
    configs.RopeConfig: {
        "theta": [10_000.0, 50.0],
        "interleaved": [False, True],
        "scaling": [None, {"factor": 4.0, "original_max_seq_len": 16}],
    },
    configs.BlockConfig: {"norm": ["pre", "peri", "sandwich"], "layer_scale": [None, 0.1]},
    configs.LTIInjectionConfig: {"decay_init": [0.2**0.5, 0.9]},
    configs.GateInjectionConfig: {"add_e": [True, False]},
    configs.NormalInitConfig: {"std": [0.7]},
    configs.SinusoidalLoopConfig: {"num_channels": [5, 16], "positions": [False, True]},
    configs.LearnedLoopConfig: {"num_loops": [2]},
    configs.WeightLoRAConfig: {"rank": [2], "num_loops": [3]},
    configs.OutputLoRAConfig: {"rank": [2], "num_loops": [3]},
    configs.LoopScaleConfig: {"num_loops": [3]},
    configs.DepthAttentionConfig: {"num_recent_loops": [1, 2, 3]},
    configs.ACTConfig: {
        "bias_init": [-3.0, 0.0],
        "threshold": [0.99, 0.9],
        "keep_remainder": [True, False],
    },
    configs.UniversalACTConfig: {
        "bias_init": [1.0, -1.0],
        "readout": ["basic", "accumulated"],
        "keep_remainder": [True, False],
    },
    configs.ValueEmbeddingConfig: {"layers": [[0]], "gate_channels": [1, 8]},
}


def examples(part: type) -> list[Json]:
    """All combinations of a part's row, as JSON."""
    row = EXAMPLES.get(part, {})
    tag = {"kind": part.kind} if hasattr(part, "kind") else {}
    return [tag | dict(zip(row, values, strict=True)) for values in product(*row.values())]


# --- the strategy --------------------------------------------------------------------------------
#
# It makes JSON, not configs: the tests' type checker draws random numbers when a config is built,
# which hypothesis forbids inside a strategy.

INJECTIONS = [
    (example, from_dict(part, example).adds_e)
    for part in SEAMS["injection"]
    for example in examples(part)
]
WITH_KV_HEADS = [part.kind for part in SEAMS["attention"] if part.has_kv_heads]


def one_of(parts: Sequence[type]) -> st.SearchStrategy[Json]:
    """An example of any of these parts, each as likely."""
    return st.one_of([st.sampled_from(examples(part)) for part in parts])


@st.composite
def model_fields(draw: st.DrawFn) -> Json:
    """The JSON of small configurations over all members of all seams."""
    some = lambda seam: draw(one_of(SEAMS[seam]))  # noqa: E731
    some_or_none = lambda seam: draw(st.none() | one_of(SEAMS[seam]))  # noqa: E731
    counts = [draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))]
    layers = st.lists(st.integers(0, sum(counts) - 1), min_size=1, unique=True)
    attention, final_norm = some("attention"), draw(st.booleans())
    injection, adds_e = draw(st.sampled_from(INJECTIONS))
    depth_attention = value_embedding = None
    if attention["kind"] in WITH_KV_HEADS:
        depth_attention, value_embedding = map(some_or_none, ("depth_attention", "value_embedding"))
    if value_embedding is not None:
        value_embedding = value_embedding | {"layers": draw(layers)}
    # Experts twice: in a batch they are most easily wrong.
    core = draw(st.none() | one_of([*SEAMS["core_feed_forward"], configs.MoEConfig]))
    return {
        "vocab_size": 32,
        "d_model": 16,
        "max_seq_len": 64,
        "num_prelude_layers": counts[0],
        "num_core_layers": counts[1],
        "num_coda_layers": counts[2],
        "num_loops": draw(st.integers(1, 4)),
        "attention": attention,
        "feed_forward": some("feed_forward"),
        "core_feed_forward": core,
        "rope": some_or_none("rope"),
        "block": some("block"),
        "injection": injection,
        "state_init": some("state_init") if adds_e else {"kind": "copy"},
        "loop_embedding": some_or_none("loop_embedding"),
        "loop_adapter": some_or_none("loop_adapter"),
        "depth_attention": depth_attention,
        "halting": some_or_none("halting"),
        "value_embedding": value_embedding,
        "prelude_norm": draw(st.booleans()),
        "loop_norm": draw(st.booleans()),
        "readout": draw(
            st.sampled_from(["none", "linear", *(["final_norm"] if final_norm else [])])
        ),
        "final_norm": final_norm,
        "embed_scale": draw(st.sampled_from([1.0, 3.0])),
        "tie_embeddings": draw(st.booleans()),
    }


@torch.no_grad()
def scripted_model(vocab_size: int, follows: dict[int, int]) -> RecurrentDepthLM:
    """A model whose most likely next token depends on the last token alone, as ``follows`` says."""
    config = small_config(
        vocab_size=vocab_size,
        d_model=128,
        injection=configs.NoInjectionConfig(),
        tie_embeddings=False,
        max_seq_len=256,
    )
    model = random_model(config)
    for name, weight in model.named_parameters():
        if name.endswith(("attention.out.weight", "feed_forward.down.weight", "head.weight")):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
    model.embed.weight.copy_(torch.randn(vocab_size, 128, generator=seeded(1)))
    for last, token in follows.items():
        model.head.weight[token] += model.embed.weight[last]
    return model
