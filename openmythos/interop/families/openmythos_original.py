"""The original OpenMythos (kyegomez/OpenMythos, package open-mythos 0.5.0).

Its core is one block, called ``recurrent.block``. Its halting drops the probability that remains
after the last loop (``keep_remainder=False``), and so does a model loaded from it.

Source: https://github.com/kyegomez/OpenMythos at 8c68c1f, open_mythos/main.py.
"""

from collections.abc import Collection, Mapping
from typing import Any

from openmythos.config import (
    ACTConfig,
    AttentionConfig,
    BlockConfig,
    CopyInitConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    OriginalLTIInjectionConfig,
    OutputLoRAConfig,
    RopeConfig,
    SinusoidalLoopConfig,
    SwiGLUConfig,
)
from openmythos.interop.mapping import (
    AnyRule,
    Family,
    Join,
    Recomputed,
    Rename,
    Reshape,
    TiedCopy,
    check_fields,
)

INTEGERS = (
    *("vocab_size", "dim", "n_heads", "n_kv_heads", "max_seq_len", "max_loop_iters"),
    *("prelude_layers", "coda_layers", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"),
    *("qk_nope_head_dim", "v_head_dim", "n_experts", "n_shared_experts", "n_experts_per_tok"),
    *("expert_dim", "lora_rank"),
)
TYPES = {
    **dict.fromkeys(INTEGERS, int),
    "attn_type": str,
    "act_threshold": float,
    "rope_theta": float,
}
# Dropout acts in training only; the model does not use the other field.
SKIPPED = {"dropout": 0.0, "max_output_tokens": 4096}
# Defaults of the fields that one of its two kinds of attention does not use.
UNUSED = {
    "n_kv_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


def recognises(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether config.json has this family's own fields and the weights its core's name."""
    fields = {"max_loop_iters", "prelude_layers", "attn_type"} <= data.keys()
    return fields and any(name.startswith("recurrent.") for name in names)


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read a MythosConfig.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    f = check_fields(data, types=TYPES, skipped=SKIPPED)
    dim, loops, top = f["dim"], f["max_loop_iters"], f["n_experts_per_tok"]
    channels = dim // 8
    return ModelConfig(
        vocab_size=f["vocab_size"],
        d_model=dim,
        num_prelude_layers=f["prelude_layers"],
        num_core_layers=1,
        num_coda_layers=f["coda_layers"],
        num_loops=loops,
        attention=_attention(f),
        feed_forward=SwiGLUConfig(d_ff=4 * dim // 3),
        core_feed_forward=MoEConfig(
            num_experts=f["n_experts"],
            num_experts_per_token=top,
            d_expert=f["expert_dim"],
            num_shared_experts=f["n_shared_experts"],
            d_shared=f["expert_dim"] * top,
            scoring="softmax",
        ),
        max_seq_len=f["max_seq_len"],
        rope=RopeConfig(theta=f["rope_theta"], interleaved=True),
        block=BlockConfig(norm="pre", norm_eps=1e-6),
        injection=OriginalLTIInjectionConfig(),
        state_init=CopyInitConfig(),
        loop_embedding=SinusoidalLoopConfig(num_channels=channels) if channels else None,
        loop_adapter=OutputLoRAConfig(rank=f["lora_rank"], num_loops=loops),
        halting=ACTConfig(threshold=f["act_threshold"], keep_remainder=False),
        prelude_norm=False,
    )


def _attention(f: Mapping[str, Any]) -> AttentionConfig:
    if f["attn_type"] == "mla":
        return MLAConfig(
            num_heads=f["n_heads"],
            q_lora_rank=f["q_lora_rank"],
            kv_lora_rank=f["kv_lora_rank"],
            qk_nope_head_dim=f["qk_nope_head_dim"],
            qk_rope_head_dim=f["qk_rope_head_dim"],
            v_head_dim=f["v_head_dim"],
        )
    if f["attn_type"] != "gqa":
        raise ValueError(f"config.json: attn_type is {f['attn_type']!r}; allowed: 'gqa', 'mla'")
    if f["n_heads"] < 1 or f["dim"] % f["n_heads"]:
        raise ValueError(f"config.json: n_heads is {f['n_heads']}; it must divide dim={f['dim']}")
    return GQAConfig(
        num_heads=f["n_heads"],
        num_kv_heads=f["n_kv_heads"],
        head_dim=f["dim"] // f["n_heads"],
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as a MythosConfig."""
    moe, lora, halting = config.core_ff, config.loop_adapter, config.halting
    if not (
        isinstance(moe, MoEConfig)
        and isinstance(lora, OutputLoRAConfig)
        and isinstance(halting, ACTConfig)
        and config.rope is not None
    ):
        raise ValueError(
            "the original OpenMythos has experts in the core, rotary positions, an output_lora "
            "loop adapter and ACT halting; this model lacks one of them"
        )
    attention = config.attention
    kept = _attention_fields(attention)
    return {
        **UNUSED,
        **kept,
        **SKIPPED,
        "attn_type": attention.kind,
        "n_heads": attention.num_heads,
        "vocab_size": config.vocab_size,
        "dim": config.d_model,
        "max_seq_len": config.max_seq_len,
        "max_loop_iters": lora.num_loops,
        "prelude_layers": config.num_prelude_layers,
        "coda_layers": config.num_coda_layers,
        "n_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "n_experts_per_tok": moe.num_experts_per_token,
        "expert_dim": moe.d_expert,
        "act_threshold": halting.threshold,
        "rope_theta": config.rope.theta,
        "lora_rank": lora.rank,
    }


def _attention_fields(attention: AttentionConfig) -> dict[str, int]:
    """The fields of the attention under the original's names."""
    if isinstance(attention, GQAConfig):
        return {"n_kv_heads": attention.num_kv_heads}
    return {name: getattr(attention, name) for name in UNUSED if name != "n_kv_heads"}


def rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor; the original's experts are separate modules, ours are stacked."""
    found: list[AnyRule] = [
        Rename("embed.weight", "embed.weight"),
        TiedCopy("head.weight", of="embed.weight"),
        Recomputed("freqs_cis"),
        Recomputed("freqs_cis_mla"),
        Rename("norm.weight", "final_norm.weight"),
        Rename("recurrent.norm.weight", "injection.norm.weight"),
        Rename("recurrent.injection.log_A", "injection.log_a"),
        Rename("recurrent.injection.log_dt", "injection.log_dt"),
        Rename("recurrent.injection.B", "injection.weight"),
        Rename("recurrent.lora.down.weight", "output_lora.down.weight"),
        Rename("recurrent.lora.B", "output_lora.up.weight", transpose=True),
        Rename("recurrent.lora.scale.weight", "output_lora.scale"),
        Rename("recurrent.act.halt.weight", "halting.proj.weight"),
        Rename("recurrent.act.halt.bias", "halting.proj.bias"),
        *_block("recurrent.block", "core.0", config),
        *_experts("recurrent.block.ffn", "core.0.feed_forward", config.core_ff),
    ]
    for stage, count in (("prelude", config.num_prelude_layers), ("coda", config.num_coda_layers)):
        for layer in range(count):
            name = f"{stage}.{layer}"
            found += _block(name, name, config)
            found += _dense(f"{name}.ffn", f"{name}.feed_forward")
    return found


def _block(theirs: str, ours: str, config: ModelConfig) -> list[AnyRule]:
    part, a, b = config.attention, f"{theirs}.attn", f"{ours}.attention"
    found: list[AnyRule] = [
        Rename(f"{theirs}.attn_norm.weight", f"{ours}.attention_norm.weight"),
        Rename(f"{theirs}.ffn_norm.weight", f"{ours}.feed_forward_norm.weight"),
        Rename(f"{a}.wo.weight", f"{b}.out.weight"),
    ]
    if isinstance(part, GQAConfig):
        q, kv = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
        names = (f"{a}.wq.weight", f"{a}.wk.weight", f"{a}.wv.weight")
        return [*found, Join(names, f"{b}.qkv.weight", sizes=(q, kv, kv))]
    return [
        *found,
        Join(
            (f"{a}.q_down.weight", f"{a}.kv_down.weight"),
            f"{b}.down.weight",
            sizes=(part.q_lora_rank, part.kv_lora_rank + part.qk_rope_head_dim),
        ),
        Join(
            (f"{a}.q_up_nope.weight", f"{a}.q_up_rope.weight"),
            f"{b}.q_up.weight",
            sizes=(part.qk_nope_head_dim, part.qk_rope_head_dim),
            groups=part.num_heads,
        ),
        Rename(f"{a}.q_norm.weight", f"{b}.q_norm.weight"),
        Rename(f"{a}.kv_norm.weight", f"{b}.kv_norm.weight"),
        Rename(f"{a}.kv_up.weight", f"{b}.kv_up.weight"),
    ]


def _dense(theirs: str, ours: str) -> list[AnyRule]:
    return [
        Join((f"{theirs}.gate.weight", f"{theirs}.up.weight"), f"{ours}.gate_up.weight"),
        Rename(f"{theirs}.down.weight", f"{ours}.down.weight"),
    ]


def _experts(theirs: str, ours: str, moe: object) -> list[AnyRule]:
    assert isinstance(moe, MoEConfig)
    routed = [f"{theirs}.routed_experts.{j}" for j in range(moe.num_experts)]
    shared = [f"{theirs}.shared_experts.{j}" for j in range(moe.num_shared_experts)]
    gate_up = tuple(f"{name}.{part}.weight" for name in routed for part in ("gate", "up"))
    down = tuple(f"{name}.down.weight" for name in routed)
    found: list[AnyRule] = [
        Rename(f"{theirs}.router.weight", f"{ours}.router.weight"),
        Reshape(
            f"{theirs}.router_bias",
            f"{ours}.bias",
            their_shape=(moe.num_experts,),
            our_shape=(moe.bias_loops, moe.num_experts),
        ),
        Join(gate_up, f"{ours}.gate_up", stack=moe.num_experts),
        Join(down, f"{ours}.down", stack=moe.num_experts),
    ]
    if shared:
        # A sum of shared experts is one wider expert: more rows of gate and up, columns of down.
        wide = tuple(f"{name}.{part}.weight" for part in ("gate", "up") for name in shared)
        narrow = tuple(f"{name}.down.weight" for name in shared)
        found.append(Join(wide, f"{ours}.shared.gate_up.weight"))
        found.append(Join(narrow, f"{ours}.shared.down.weight", dim=1))
    return found


FAMILY = Family(
    name="the original OpenMythos",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
)
