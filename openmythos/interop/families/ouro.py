"""Ouro, also called LoopLM (ByteDance/Ouro-1.4B and 2.6B): the whole stack is the loop.

Its final norm ends every loop and feeds the next one, the gate and the head, so it is our
``loop_norm``, and nothing normalises again before the head.

Source: Ouro (arXiv 2510.25741); the modelling file shipped with its checkpoints.
"""

from collections.abc import Collection, Mapping
from typing import Any

from openmythos.config import (
    BlockConfig,
    CopyInitConfig,
    ExitGateConfig,
    GQAConfig,
    ModelConfig,
    NoInjectionConfig,
    SwiGLUConfig,
)
from openmythos.interop.families.transformers_config import (
    GENERIC_FIELDS,
    ROPE_FIELDS,
    read_rope,
    write_rope,
)
from openmythos.interop.mapping import AnyRule, Family, Join, Rename, check_fields
from openmythos.model.exit import CumulativeThreshold

MODEL_TYPE = "ouro"
TYPES = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "total_ut_steps": int,
}
FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False}
# Fields for training or initialisation only, or unused without a sliding window.
UNUSED = {"attention_dropout", "initializer_range", "max_window_layers", "sliding_window"}
# Early exit is an argument of our ``generate``; ``exit_options`` makes it from these fields.
EXIT = {"early_exit_threshold", "early_exit_step", "chunk_size"}


def recognises(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether config.json has this family's ``model_type``."""
    return data.get("model_type") == MODEL_TYPE


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read an OuroConfig.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    types = TYPES | ({"head_dim": int} if data.get("head_dim") is not None else {})
    skipped = GENERIC_FIELDS | ROPE_FIELDS | UNUSED | EXIT | {"layer_types", "head_dim"}
    f = check_fields(data, types=types, fixed=FIXED, skipped=skipped)
    layers, dim, heads = f["num_hidden_layers"], f["hidden_size"], f["num_attention_heads"]
    kinds = data.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        allowed = f"'full_attention' for each of {layers} layers, or null"
        raise ValueError(f"config.json: layer_types is {kinds!r}; supported is {allowed}")
    if "head_dim" not in f and (heads < 1 or dim % heads):
        allowed = f"it must divide hidden_size={dim}, or head_dim be given"
        raise ValueError(f"config.json: num_attention_heads is {heads}; {allowed}")
    return ModelConfig(
        vocab_size=f["vocab_size"],
        d_model=dim,
        num_prelude_layers=0,
        num_core_layers=layers,
        num_coda_layers=0,
        num_loops=f["total_ut_steps"],
        attention=GQAConfig(
            num_heads=heads,
            num_kv_heads=f["num_key_value_heads"],
            head_dim=f.get("head_dim") or dim // heads,
        ),
        feed_forward=SwiGLUConfig(d_ff=f["intermediate_size"]),
        max_seq_len=f["max_position_embeddings"],
        rope=read_rope(data),
        block=BlockConfig(norm="peri", norm_eps=f["rms_norm_eps"]),
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
        halting=ExitGateConfig(),
        prelude_norm=False,
        loop_norm=True,
        final_norm=False,
        tie_embeddings=False,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as an OuroConfig without early exit."""
    attention, ffn, rope = config.attention, config.feed_forward, config.rope
    if not (
        isinstance(attention, GQAConfig) and isinstance(ffn, SwiGLUConfig) and rope is not None
    ):
        raise ValueError(
            "Ouro has GQA attention, a SwiGLU feed-forward and rotary positions; this model lacks "
            "one of them"
        )
    return {
        **FIXED,
        **write_rope(rope),
        "model_type": MODEL_TYPE,
        "architectures": ["OuroForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": ffn.d_ff,
        "num_hidden_layers": config.num_core_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.block.norm_eps,
        "total_ut_steps": config.num_loops,
        "layer_types": ["full_attention"] * config.num_core_layers,
        "early_exit_threshold": 1.0,
    }


def exit_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """The early-exit fields of config.json as arguments of ``generate``.

    Ouro's code computes every loop and the fields choose which one is read; ``early_exit_step``
    takes precedence over ``early_exit_threshold``. Here a token that exits skips the other loops.

    Source: Ouro (arXiv 2510.25741), section 3; the forward of its modelling file.
    """
    step, threshold = data.get("early_exit_step"), data.get("early_exit_threshold")
    if step is not None:
        return {"num_loops": step + 1}
    if threshold is None or threshold == 1:
        return {}
    return {"exit_rule": CumulativeThreshold(threshold=threshold)}


def rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor."""
    found: list[AnyRule] = [
        Rename("model.embed_tokens.weight", "embed.weight"),
        Rename("model.norm.weight", "loop_norm.weight"),
        Rename("model.early_exit_gate.weight", "halting.proj.weight"),
        Rename("model.early_exit_gate.bias", "halting.proj.bias"),
        Rename("lm_head.weight", "head.weight"),
    ]
    for layer in range(config.num_core_layers):
        found += _block(f"model.layers.{layer}", f"core.{layer}", config)
    return found


def _block(theirs: str, ours: str, config: ModelConfig) -> list[AnyRule]:
    part, a, m = config.attention, f"{theirs}.self_attn", f"{theirs}.mlp"
    assert isinstance(part, GQAConfig)
    q, kv = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
    norms = {
        "input_layernorm": "attention_norm",
        "input_layernorm_2": "attention_out_norm",
        "post_attention_layernorm": "feed_forward_norm",
        "post_attention_layernorm_2": "feed_forward_out_norm",
    }
    return [
        *(Rename(f"{theirs}.{a}.weight", f"{ours}.{b}.weight") for a, b in norms.items()),
        Join(
            tuple(f"{a}.{name}_proj.weight" for name in "qkv"),
            f"{ours}.attention.qkv.weight",
            sizes=(q, kv, kv),
        ),
        Rename(f"{a}.o_proj.weight", f"{ours}.attention.out.weight"),
        Join(
            (f"{m}.gate_proj.weight", f"{m}.up_proj.weight"),
            f"{ours}.feed_forward.gate_up.weight",
        ),
        Rename(f"{m}.down_proj.weight", f"{ours}.feed_forward.down.weight"),
    ]


FAMILY = Family(
    name="Ouro",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
)
