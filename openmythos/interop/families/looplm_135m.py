"""LoopLM-135M (harims95/LoopLM): four layers, one that loops, two; with QK-norm.

Not Ouro, which is called LoopLM as well. The published LoopLM-135M-naive adds e at every loop; with
``use_a_matrix`` the injection is Parcae's.

Source: https://github.com/harims95/LoopLM at 7e96b26, looplm/config.py, model.py and parcae.py.
"""

from collections.abc import Collection, Mapping
from typing import Any

from openmythos.config import (
    AddInjectionConfig,
    BlockConfig,
    GQAConfig,
    LTIInjectionConfig,
    ModelConfig,
    NormalInitConfig,
    RopeConfig,
    SwiGLUConfig,
)
from openmythos.interop.families.transformers_config import GENERIC_FIELDS
from openmythos.interop.mapping import AnyRule, Family, Rename, TiedCopy, check_fields

STATE_STD = 0.02  # ``h0_std``, which no config changes
NORM_EPS = 1e-6
MAX_SEQ_LEN = 1024  # of training; generation cuts its context to it
TYPES = {
    **dict.fromkeys(("vocab_size", "d_model", "n_prelude", "n_coda", "mu_rec"), int),
    **dict.fromkeys(("n_q_heads", "n_kv_heads", "head_dim", "dense_ffn"), int),
    **dict.fromkeys(("qk_norm", "tie_embeddings", "use_a_matrix", "use_input_norm"), bool),
    "rope_theta": float,
}
TRAINING = {"final_z_loss_coef": 1e-4, "init_std": 0.02}
STAGES = ("prelude", "coda")


def recognises(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """By two fields of its config and the name of the layer that loops."""
    fields = {"n_prelude", "mu_rec"} <= data.keys()
    return fields and any("loop.attn.qkv" in name for name in names)


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read LoopLM's ``ModelConfig``.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    f = check_fields(data, types=TYPES, skipped=(*TRAINING, "preset", *GENERIC_FIELDS))
    return ModelConfig(
        vocab_size=f["vocab_size"],
        d_model=f["d_model"],
        num_prelude_layers=f["n_prelude"],
        num_core_layers=1,
        num_coda_layers=f["n_coda"],
        num_loops=f["mu_rec"],
        attention=GQAConfig(
            num_heads=f["n_q_heads"],
            num_kv_heads=f["n_kv_heads"],
            head_dim=f["head_dim"],
            qk_norm="weighted" if f["qk_norm"] else "none",
        ),
        feed_forward=SwiGLUConfig(d_ff=f["dense_ffn"]),
        max_seq_len=MAX_SEQ_LEN,
        rope=RopeConfig(theta=f["rope_theta"]),
        block=BlockConfig(norm="pre", norm_eps=NORM_EPS),
        injection=LTIInjectionConfig() if f["use_a_matrix"] else AddInjectionConfig(),
        state_init=NormalInitConfig(std=STATE_STD),
        prelude_norm=f["use_input_norm"],
        tie_embeddings=f["tie_embeddings"],
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as LoopLM's, with the training fields of the published model."""
    attention, dense, rope = config.attention, config.feed_forward, config.rope
    if not (
        isinstance(attention, GQAConfig) and isinstance(dense, SwiGLUConfig) and rope is not None
    ):
        raise ValueError(
            "LoopLM-135M has grouped-query attention, SwiGLU and rotary positions; this model "
            "lacks one of them"
        )
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "n_prelude": config.num_prelude_layers,
        "n_coda": config.num_coda_layers,
        "mu_rec": config.num_loops,
        "n_q_heads": attention.num_heads,
        "n_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "qk_norm": attention.qk_norm == "weighted",
        "rope_theta": rope.theta,
        "dense_ffn": dense.d_ff,
        "tie_embeddings": config.tie_embeddings,
        "use_a_matrix": isinstance(config.injection, LTIInjectionConfig),
        "use_input_norm": config.prelude_norm,
        **TRAINING,
    }


def rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor."""
    found: list[AnyRule] = [
        Rename("embed.weight", "embed.weight"),
        TiedCopy("lm_head.weight", of="embed.weight")
        if config.tie_embeddings
        else Rename("lm_head.weight", "head.weight"),
        Rename("final_norm.weight", "final_norm.weight"),
        *_block("loop", "core.0", config),
    ]
    if config.prelude_norm:
        found.append(Rename("prelude_norm.weight", "prelude_norm.weight"))
    if isinstance(config.injection, LTIInjectionConfig):
        found += [
            Rename("loop.A_log", "injection.a_log"),
            Rename("loop.dt_bias", "injection.dt_bias"),
            Rename("loop.B", "injection.weight"),
        ]
    counts = (config.num_prelude_layers, config.num_coda_layers)
    for stage, count in zip(STAGES, counts, strict=True):
        for layer in range(count):
            found += _block(f"{stage}.{layer}", f"{stage}.{layer}", config)
    return found


def _block(theirs: str, ours: str, config: ModelConfig) -> list[AnyRule]:
    names = {
        "attn_norm.weight": "attention_norm.weight",
        "attn.qkv.weight": "attention.qkv.weight",
        "attn.proj.weight": "attention.out.weight",
        "ffn_norm.weight": "feed_forward_norm.weight",
        "ffn.w13.weight": "feed_forward.gate_up.weight",
        "ffn.w2.weight": "feed_forward.down.weight",
    }
    part = config.attention
    if isinstance(part, GQAConfig) and part.qk_norm == "weighted":
        names["attn.q_norm.weight"] = "attention.q_norm_weight"
        names["attn.k_norm.weight"] = "attention.k_norm_weight"
    return [Rename(f"{theirs}.{a}", f"{ours}.{b}") for a, b in names.items()]


FAMILY = Family(
    name="LoopLM-135M",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
    prefixes=("model.",),  # which the release on the hub has before every name
)
