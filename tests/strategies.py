"""Random small models over all seams, for property tests; and one plain small model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from hypothesis import strategies as st

from openmythos.config import (
    CopyInitConfig,
    GateInjectionConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    NoInjectionConfig,
    SwiGLUConfig,
)
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
    injection = changes.get("injection")
    if injection in (NoInjectionConfig(), GateInjectionConfig(add_e=False)):
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
    model = RecurrentDepthLM(config, seeded(seed))
    randomise(model, seed)
    return model.to(dtype).eval()


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=seeded(seed))


# --- the strategies ------------------------------------------------------------------------------
#
# They make JSON, not configs: the tests' type checker draws random numbers when a config is built,
# which hypothesis forbids inside a strategy.

Json = dict[str, Any]


def attentions() -> st.SearchStrategy[Json]:
    grouped = st.fixed_dictionaries(
        {
            "kind": st.just("gqa"),
            "num_heads": st.just(4),
            "num_kv_heads": st.sampled_from([1, 2, 4]),
            "head_dim": st.sampled_from([2, 4]),
            "qk_norm": st.sampled_from(["none", "weightless", "weighted"]),
            "qk_norm_eps": st.sampled_from([None, 1e-3]),
            "qk_bias": st.booleans(),
        }
    )
    latent = st.fixed_dictionaries(
        {
            "kind": st.just("mla"),
            "num_heads": st.sampled_from([1, 3]),
            "q_lora_rank": st.just(5),
            "kv_lora_rank": st.sampled_from([3, 6]),
            "qk_nope_head_dim": st.just(3),
            "qk_rope_head_dim": st.sampled_from([2, 4]),
            "v_head_dim": st.sampled_from([2, 5]),
        }
    )
    return st.one_of(grouped, latent)


def core_feed_forwards() -> st.SearchStrategy[Json | None]:
    sparse = st.fixed_dictionaries(
        {
            "kind": st.just("moe"),
            "num_experts": st.just(4),
            "num_experts_per_token": st.sampled_from([1, 2, 4]),
            "d_expert": st.sampled_from([4, 5]),
            "num_shared_experts": st.sampled_from([0, 1, 2]),
            "d_shared": st.sampled_from([None, 3]),
            "scoring": st.sampled_from(["sigmoid", "softmax"]),
            "routed_scale": st.sampled_from([1.0, 1.5]),
            "bias_loops": st.sampled_from([1, 3]),
        }
    )
    dense = {"kind": "relu_squared", "d_ff": 10}
    return st.one_of(st.none(), st.just(dense), sparse, sparse)


@st.composite
def model_fields(draw: st.DrawFn) -> Json:
    """The JSON of small configurations over all members of all seams."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    counts = [draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))]
    attention, final_norm = draw(attentions()), draw(st.booleans())
    tables = st.fixed_dictionaries(
        {
            "layers": st.lists(st.integers(0, sum(counts) - 1), min_size=1, unique=True),
            "gate_channels": st.sampled_from([1, 8]),
        }
    )
    chens = {"kind": "gate", "add_e": False}
    plain = ("original_lti", "linear", "add", "none", "gate", chens)
    recent = st.fixed_dictionaries({"num_recent_loops": st.integers(1, 3)})
    injection = pick("lti", {"kind": "lti", "decay_init": 0.9}, *plain)
    others = ["zeros", {"kind": "normal", "std": 0.7}]
    return {
        "vocab_size": 32,
        "d_model": 16,
        "max_seq_len": 64,
        "num_prelude_layers": counts[0],
        "num_core_layers": counts[1],
        "num_coda_layers": counts[2],
        "num_loops": draw(st.integers(1, 4)),
        "attention": attention,
        "feed_forward": pick(
            {"kind": "swiglu", "d_ff": 12}, {"kind": "relu_squared", "d_ff": 12, "scale": 0.5}
        ),
        "core_feed_forward": draw(core_feed_forwards()),
        "rope": pick(
            None,
            {},
            {"theta": 50.0, "interleaved": True},
            {"theta": 50.0, "scaling": {"factor": 4.0, "original_max_seq_len": 16}},
        ),
        "block": {"norm": pick("pre", "peri", "sandwich"), "layer_scale": pick(None, 0.1)},
        "injection": injection,
        "state_init": pick("copy", *(others if injection not in ("none", chens) else [])),
        "loop_embedding": pick(
            None,
            {"kind": "sinusoidal", "num_channels": 5},
            {"kind": "sinusoidal", "num_channels": 16, "positions": True},
            {"kind": "learned", "num_loops": 2},
        ),
        "loop_adapter": pick(
            None,
            {"kind": "weight_lora", "rank": 2, "num_loops": 3},
            {"kind": "output_lora", "rank": 2, "num_loops": 3},
        ),
        "depth_attention": draw(st.none() | recent) if attention["kind"] == "gqa" else None,
        "halting": pick(
            None,
            "act",
            {"kind": "universal_act", "bias_init": -1.0},
            {"kind": "universal_act", "readout": "accumulated", "keep_remainder": False},
            {"kind": "act", "bias_init": 0.0, "threshold": 0.9, "keep_remainder": False},
            "pondernet",
            "exit_gate",
        ),
        "value_embedding": draw(st.none() | tables) if attention["kind"] == "gqa" else None,
        "prelude_norm": draw(st.booleans()),
        "loop_norm": draw(st.booleans()),
        "readout": pick("none", "linear", *(["final_norm"] if final_norm else [])),
        "final_norm": final_norm,
        "embed_scale": pick(1.0, 3.0),
        "tie_embeddings": draw(st.booleans()),
    }
