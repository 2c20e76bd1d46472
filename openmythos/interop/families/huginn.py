"""Huginn (seal-rg/recurrent-pretraining) and the Llama models that were retrofitted to its form.

Both have ``model_type: huginn_raven`` and the same tensor names. A retrofitted block has two norms,
Huginn's has four: that tells them apart. Retrofitted models also have rotate-half rotary positions
and no norm between loop and coda.

Source: Huginn (arXiv 2502.05171), recpre/raven_modeling_minimal.py at 59e0b69; Retrofitted
    Recurrence (arXiv 2511.07384), convert_pretrained_model/raven_modeling_minimal_llama.py.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from openmythos.config import (
    BlockConfig,
    GQAConfig,
    LinearInjectionConfig,
    ModelConfig,
    NormalInitConfig,
    RopeConfig,
    StateInitConfig,
    SwiGLUConfig,
    ZerosInitConfig,
)
from openmythos.interop.families.transformers_config import (
    GENERIC_FIELDS,
    ROPE_FIELDS,
    read_rope,
    write_rope,
)
from openmythos.interop.mapping import (
    AnyRule,
    Family,
    Recomputed,
    Rename,
    Reshape,
    Split,
    TiedCopy,
    check_fields,
)

MODEL_TYPE = "huginn_raven"
TYPES = {
    "n_embd": int,
    "n_heads": int,
    "intermediate_size": int,
    "vocab_size": int,
    "n_layers_in_prelude": int,
    "n_layers_in_recurrent_block": int,
    "n_layers_in_coda": int,
    "mean_recurrence": int,
    "norm_eps": float,
    "qk_bias": bool,
    "tie_embeddings": bool,
    "init_values": dict,
}
FIXED = {
    "bias": False,
    "block_class_name": "SandwichBlock",  # also in retrofitted models
    "injection_type": "linear",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "state_init": "like-init",
    "test_time_noise": 0,
}
# Fields for training and initialisation only; ``tie_word_embeddings`` equals ``tie_embeddings``.
TRAINING = {
    "activation_checkpoint_impl": "per-iteration",
    "architecture_class_name": "RecurrentGPT",
    "init_orthogonal": False,
    "init_strategy": "takase",
    "mean_backprop_depth": 8,
    "padding_multiple": 4096,
    "sampling_scheme": "poisson-lognormal-filling",
    "test_time_noise_type": "fixed",
}
DERIVED = {"effective_expected_depth", "n_layers", "num_attention_heads", "tie_word_embeddings"}
CHECKED = {"head_dim", "num_key_value_heads", "padded_vocab_size"}  # by ``_model``
SKIPPED = GENERIC_FIELDS | TRAINING.keys() | DERIVED | CHECKED
STAGES = {"prelude": "prelude", "core_block": "core", "coda": "coda"}


def recognises(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether this is Huginn itself: its blocks have a third norm."""
    return data.get("model_type") == MODEL_TYPE and any(".norm_3." in name for name in names)


def recognises_retrofitted(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether this is a retrofitted model: its blocks have no third norm."""
    return data.get("model_type") == MODEL_TYPE and not recognises(data, names)


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read Huginn's RavenConfig.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    types = TYPES | {"block_size": int, "rope_base": float}
    f = check_fields(data, types=types, fixed=FIXED, skipped=SKIPPED)
    rope = RopeConfig(theta=f["rope_base"], interleaved=True)
    return _model(data, f, f["n_heads"], "sandwich", rope, f["block_size"])


def read_retrofitted(data: Mapping[str, Any]) -> ModelConfig:
    """Read a retrofitted Llama's RavenConfig; its ``rope_base`` is not used by the model.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    types = TYPES | {"num_key_value_heads": int, "max_position_embeddings": int}
    stale = ROPE_FIELDS | {"block_size", "rope_base"}
    f = check_fields(data, types=types, fixed=FIXED, skipped=(SKIPPED | stale) - types.keys())
    if f["qk_bias"] and f["num_key_value_heads"] != f["n_heads"]:
        raise ValueError("config.json: qk_bias is True; it needs num_key_value_heads = n_heads")
    limit = f["max_position_embeddings"]
    return _model(data, f, f["num_key_value_heads"], "pre", read_rope(data), limit)


def _model(
    data: Mapping[str, Any],
    f: Mapping[str, Any],
    num_kv_heads: int,
    norm: Literal["pre", "sandwich"],
    rope: RopeConfig,
    max_seq_len: int,
) -> ModelConfig:
    """The config from what both variants share; ``f`` are the checked fields."""
    dim, heads = f["n_embd"], f["n_heads"]
    if heads < 1 or dim % heads:
        raise ValueError(f"config.json: n_heads is {heads}; it must divide n_embd={dim}")
    values = {
        "head_dim": dim // heads,
        "num_key_value_heads": num_kv_heads,
        "padded_vocab_size": f["vocab_size"],
    }
    check_fields({name: data[name] for name in values if name in data}, types={}, fixed=values)
    known = {"std": float, "embed_scale": float}
    init = check_fields(f["init_values"], types=known, skipped=("embedding", "out_proj"))
    return ModelConfig(
        vocab_size=f["vocab_size"],
        d_model=dim,
        num_prelude_layers=f["n_layers_in_prelude"],
        num_core_layers=f["n_layers_in_recurrent_block"],
        num_coda_layers=f["n_layers_in_coda"],
        num_loops=f["mean_recurrence"],
        attention=GQAConfig(
            num_heads=heads,
            num_kv_heads=num_kv_heads,
            head_dim=dim // heads,
            qk_bias=f["qk_bias"],
        ),
        feed_forward=SwiGLUConfig(d_ff=f["intermediate_size"]),
        max_seq_len=max_seq_len,
        rope=rope,
        block=BlockConfig(norm=norm, norm_eps=f["norm_eps"]),
        injection=LinearInjectionConfig(),
        state_init=_state_init(init["std"], init["embed_scale"]),
        prelude_norm=False,
        readout="final_norm" if norm == "sandwich" else "none",
        embed_scale=init["embed_scale"],
        tie_embeddings=f["tie_embeddings"],
    )


def _state_init(std: float, embed_scale: float) -> StateInitConfig:
    """The state init: they draw noise, truncate it and scale it; a std of 0 gives exact zeros.

    The product std * embed_scale is rounded to 15 digits, so that ``write_config`` can divide it
    again exactly.
    """
    return NormalInitConfig(std=float(f"{std * embed_scale:.15g}")) if std else ZerosInitConfig()


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as Huginn's RavenConfig."""
    fields, rope = _fields(config)
    return fields | {"block_size": config.max_seq_len, "rope_base": rope.theta}


def write_retrofitted(config: ModelConfig) -> dict[str, Any]:
    """Write our config as a retrofitted Llama's RavenConfig."""
    fields, rope = _fields(config)
    lengths = {"block_size": config.max_seq_len, "max_position_embeddings": config.max_seq_len}
    return fields | lengths | write_rope(rope) | {"rope_base": rope.theta}


def _fields(config: ModelConfig) -> tuple[dict[str, Any], RopeConfig]:
    """The fields that both variants share, and the rotary positions."""
    attention, ffn, rope = config.attention, config.feed_forward, config.rope
    if not (
        isinstance(attention, GQAConfig)
        and isinstance(ffn, SwiGLUConfig)
        and isinstance(config.state_init, NormalInitConfig | ZerosInitConfig)
        and rope is not None
    ):
        raise ValueError(
            "Huginn has GQA attention, a SwiGLU feed-forward, rotary positions and a normal or "
            "zero initial state; this model lacks one of them"
        )
    std, depth = math.sqrt(2 / (5 * config.d_model)), config.effective_depth()
    state = config.state_init
    fields = {
        **FIXED,
        **TRAINING,
        "model_type": MODEL_TYPE,
        "architectures": ["RavenForCausalLM"],
        "n_embd": config.d_model,
        "n_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": config.d_model // attention.num_heads,
        "intermediate_size": ffn.d_ff,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "n_layers": config.num_layers,
        "n_layers_in_prelude": config.num_prelude_layers,
        "n_layers_in_recurrent_block": config.num_core_layers,
        "n_layers_in_coda": config.num_coda_layers,
        "mean_recurrence": config.num_loops,
        "effective_expected_depth": depth,
        "norm_eps": config.block.norm_eps,
        "qk_bias": attention.qk_bias,
        "tie_embeddings": config.tie_embeddings,
        "init_values": {
            "std": state.std / config.embed_scale if isinstance(state, NormalInitConfig) else 0.0,
            "embed_scale": config.embed_scale,
            "embedding": std,
            "out_proj": std / math.sqrt(2 * depth),
        },
    }
    return fields, rope


def rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor of either variant; only Huginn stores the rotary table."""
    found: list[AnyRule] = [
        Rename("transformer.wte.weight", "embed.weight"),
        Split("transformer.adapter.weight", ("injection.h_weight", "injection.e_weight"), dim=1),
        Rename("transformer.ln_f.weight", "final_norm.weight"),
        Recomputed("freqs_cis"),
    ]
    if config.tie_embeddings:
        found.append(TiedCopy("lm_head.weight", of="transformer.wte.weight"))
    else:
        found.append(Rename("lm_head.weight", "head.weight"))
    counts = (config.num_prelude_layers, config.num_core_layers, config.num_coda_layers)
    for (theirs, ours), count in zip(STAGES.items(), counts, strict=True):
        for layer in range(count):
            found += _block(f"transformer.{theirs}.{layer}", f"{ours}.{layer}", config)
    return found


def _block(theirs: str, ours: str, config: ModelConfig) -> list[AnyRule]:
    norms = ["attention_norm", "feed_forward_norm"]
    if config.block.norm != "pre":
        norms = ["attention_norm", "attention_out_norm", "feed_forward_norm"]
        norms.append("feed_forward_out_norm")
    found: list[AnyRule] = [
        Rename(f"{theirs}.norm_{i}.weight", f"{ours}.{name}.weight")
        for i, name in enumerate(norms, start=1)
    ]
    found += [
        Rename(f"{theirs}.attn.Wqkv.weight", f"{ours}.attention.qkv.weight"),
        Rename(f"{theirs}.attn.proj.weight", f"{ours}.attention.out.weight"),
        Rename(f"{theirs}.mlp.fc.weight", f"{ours}.feed_forward.gate_up.weight"),
        Rename(f"{theirs}.mlp.proj.weight", f"{ours}.feed_forward.down.weight"),
    ]
    part = config.attention
    if isinstance(part, GQAConfig) and part.qk_bias:
        shape = (part.num_heads, part.head_dim)
        found.append(
            Reshape(
                f"{theirs}.attn.qk_bias",
                f"{ours}.attention.qk_bias",
                their_shape=(2, 1, *shape),
                our_shape=(2 * part.num_heads, part.head_dim),
            )
        )
    return found


FAMILY = Family(
    name="Huginn",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
)
RETROFITTED = Family(
    name="retrofitted Huginn",
    recognises=recognises_retrofitted,
    read_config=read_retrofitted,
    write_config=write_retrofitted,
    rules=rules,
)
