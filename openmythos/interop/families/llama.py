"""Llama-type checkpoints, whose stack runs once, and Nanbeige's, whose stack runs twice.

Both use transformers' tensor names. All layers become the core: a Llama is a looped model with one
loop, no prelude, no coda, no injection and h_0 = e. A Nanbeige has ``num_loops`` loops, the final
norm after every loop (or after the last one only), and its own keys and values per loop.

Source: transformers 5.23, models/llama; Nanbeige4.2-3B (arXiv 2607.22083) and the
    configuration_nanbeige.py of its checkpoint.
"""

from collections.abc import Collection, Mapping
from typing import Any

from openmythos.config import (
    BlockConfig,
    CopyInitConfig,
    GQAConfig,
    ModelConfig,
    NoInjectionConfig,
    RopeConfig,
    SwiGLUConfig,
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
    Join,
    Recomputed,
    Rename,
    TiedCopy,
    check_fields,
)

INTEGERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
TYPES = {**dict.fromkeys(INTEGERS, int), "rms_norm_eps": float, "tie_word_embeddings": bool}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
NOT_INTERLEAVED = {"rope_interleaved": False}  # found in SmolLM's configs
DEFAULT_THETA = {"rope_theta": 10_000.0}
SKIPPED = {
    *GENERIC_FIELDS,
    *("initializer_range", "attention_dropout", "unk_token_id"),
    *("is_llama_config", "transformers.js_config"),
}
LOOP_TYPES = {"num_loops": int, "skip_loop_final_norm": bool}
LOOP_DEFAULTS = {"num_loops": 1, "skip_loop_final_norm": False}
# Options of Nanbeige's class that are off in every published checkpoint.
LOOP_SWITCHES = (
    *("qk_layernorm", "enable_double_loop_split", "loop_middle_layers", "loop_share_kv"),
    *("enable_hyper_connection", "enable_mhc", "enable_h_res_identity", "mhc_diff_for_loop"),
    *("mhc_identity_nohresparam", "mhc_double_stream_position_for_loop"),
    *("enable_depth_attention", "emb_neighbor_num", "emb_split_num", "ngram_vocab_size_ratio"),
    *("ngram_embedding_hidden_size", "insert_ngram_layer_idx", "ngram_insert_all_layers"),
    *("ngram_layer_downproject_size", "loop_loss_weights"),
)
# Fields that matter only if one of these options is on.
LOOP_SKIPPED = (
    *("num_residual_streams", "mhc_sinkhorn_iterations", "mhc_init_gating_factor"),
    *("depth_attention_stride", "depth_attention_recent_window"),
    *("depth_attention_static_anchor_once", "ngram_fused_mode", "ngram_mod_force_prime"),
    *("emb_tp_num", "ngram_compressed_tokenizer", "skip_ngram_for_input", "kv_channels"),
)


def recognises(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """By the model's type."""
    return data.get("model_type") == "llama" and "model.embed_tokens.weight" in names


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read a LlamaConfig.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    fields, rope = _plain_fields(data), _read_rope(data)
    f = check_fields(fields, types=TYPES, fixed=FIXED | NOT_INTERLEAVED, skipped=SKIPPED)
    return _model_config(f, rope, num_loops=1, loop_norm=False)


def _plain_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """All fields but the rotary ones, with defaults for those that may be absent or null."""
    given = {name: value for name, value in data.items() if name not in ROPE_FIELDS}
    filled = {**DEFAULTS, **given}
    heads, width = filled.get("num_attention_heads"), filled.get("hidden_size")
    if filled.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = heads
    if filled.get("head_dim") is None and isinstance(heads, int) and isinstance(width, int):
        if heads < 1 or width % heads:
            allowed = f"it must divide hidden_size={width} where head_dim is not given"
            raise ValueError(f"config.json: num_attention_heads is {heads}; {allowed}")
        filled["head_dim"] = width // heads
    return filled


def _read_rope(data: Mapping[str, Any]) -> RopeConfig:
    """The rotary positions; theta may be absent, because LlamaConfig has a default."""
    parameters = data.get("rope_parameters") or {}
    if (
        "rope_theta" in data
        and parameters.get("rope_theta", data["rope_theta"]) != data["rope_theta"]
    ):
        both = f"rope_theta is {data['rope_theta']}, and {parameters['rope_theta']} in"
        raise ValueError(f"config.json: {both} rope_parameters; they must be equal")
    return read_rope({**DEFAULT_THETA, **data})


def _model_config(
    f: Mapping[str, Any], rope: RopeConfig, *, num_loops: int, loop_norm: bool
) -> ModelConfig:
    return ModelConfig(
        vocab_size=f["vocab_size"],
        d_model=f["hidden_size"],
        num_prelude_layers=0,
        num_core_layers=f["num_hidden_layers"],
        num_coda_layers=0,
        num_loops=num_loops,
        attention=GQAConfig(
            num_heads=f["num_attention_heads"],
            num_kv_heads=f["num_key_value_heads"],
            head_dim=f["head_dim"],
        ),
        feed_forward=SwiGLUConfig(d_ff=f["intermediate_size"]),
        max_seq_len=f["max_position_embeddings"],
        rope=rope,
        block=BlockConfig(norm="pre", norm_eps=f["rms_norm_eps"]),
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
        prelude_norm=False,
        loop_norm=loop_norm,
        final_norm=not loop_norm,
        tie_embeddings=f["tie_word_embeddings"],
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as a LlamaConfig."""
    attention, feed_forward, rope = config.attention, config.feed_forward, config.rope
    if not (
        isinstance(attention, GQAConfig)
        and isinstance(feed_forward, SwiGLUConfig)
        and rope is not None
    ):
        raise ValueError(
            "a Llama has grouped-query attention, SwiGLU and rotary positions; this model lacks "
            "one of them"
        )
    return {
        **FIXED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": feed_forward.d_ff,
        "num_hidden_layers": config.num_core_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.block.norm_eps,
        **write_rope(rope),
        "tie_word_embeddings": config.tie_embeddings,
    }


def rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor; ours fuse q, k, v, and gate and up."""
    norm = "loop_norm" if config.loop_norm else "final_norm"
    head = Rename("lm_head.weight", "head.weight")
    tied = TiedCopy("lm_head.weight", of="model.embed_tokens.weight")
    found: list[AnyRule] = [
        Rename("model.embed_tokens.weight", "embed.weight"),
        Rename("model.norm.weight", f"{norm}.weight"),
        tied if config.tie_embeddings else head,
    ]
    part = config.attention
    assert isinstance(part, GQAConfig)
    q, kv = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
    for layer in range(config.num_core_layers):
        a, b = f"model.layers.{layer}", f"core.{layer}"
        qkv = tuple(f"{a}.self_attn.{name}_proj.weight" for name in "qkv")
        gate_up = (f"{a}.mlp.gate_proj.weight", f"{a}.mlp.up_proj.weight")
        found += [
            Rename(f"{a}.input_layernorm.weight", f"{b}.attention_norm.weight"),
            Join(qkv, f"{b}.attention.qkv.weight", sizes=(q, kv, kv)),
            Rename(f"{a}.self_attn.o_proj.weight", f"{b}.attention.out.weight"),
            Recomputed(f"{a}.self_attn.rotary_emb.inv_freq"),
            Rename(f"{a}.post_attention_layernorm.weight", f"{b}.feed_forward_norm.weight"),
            Join(gate_up, f"{b}.feed_forward.gate_up.weight"),
            Rename(f"{a}.mlp.down_proj.weight", f"{b}.feed_forward.down.weight"),
        ]
    return found


# --- Nanbeige -------------------------------------------------------------------------------------


def recognises_nanbeige(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """By the model's type."""
    return data.get("model_type") == "nanbeige" and "model.embed_tokens.weight" in names


def read_nanbeige_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read a NanbeigeConfig.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    used = {name: v for name, v in data.items() if v or name not in LOOP_SWITCHES}
    fields, rope = _plain_fields({**LOOP_DEFAULTS, **used}), _read_rope(data)
    f = check_fields(
        fields,
        types={**TYPES, **LOOP_TYPES},
        fixed={**FIXED, **dict.fromkeys(LOOP_SWITCHES, False)},
        skipped=(*SKIPPED, *LOOP_SKIPPED),
    )
    channels = data.get("kv_channels") or f["head_dim"]
    if channels != f["head_dim"]:
        raise ValueError(f"config.json: kv_channels is {channels}, but head_dim {f['head_dim']}")
    return _model_config(f, rope, num_loops=f["num_loops"], loop_norm=not f["skip_loop_final_norm"])


def write_nanbeige_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as a NanbeigeConfig."""
    return {
        **write_config(config),
        "architectures": ["NanbeigeForCausalLM"],
        "model_type": "nanbeige",
        "num_loops": config.num_loops,
        "loop_loss_weights": [],
        "skip_loop_final_norm": not config.loop_norm,
    }


LLAMA = Family(
    name="Llama",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
)
NANBEIGE = Family(
    name="Nanbeige",
    recognises=recognises_nanbeige,
    read_config=read_nanbeige_config,
    write_config=write_nanbeige_config,
    rules=rules,
)
