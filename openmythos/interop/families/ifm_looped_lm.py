"""IFM's LoopedLM-P1 and LoopedLM-P2 (ifm-ai/xllm-loop): one code, many topologies.

Its config.json has the fields of ``ModelConf`` under "model". Two of its architectures loop:
``transformer`` repeats a span of layers; ``huginn`` has a prelude, a core with an injection, and a
coda. The "diagonal" injection is our ``lti``. A transformer with one loop is a plain one.

Source: "Towards Looped Models Done Right", parts I and II; xllm/models/looped.py at 3af99f4 and the
    layers of ifm-ai/xllm.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from openmythos.config import (
    BlockConfig,
    CopyInitConfig,
    GQAConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    ModelConfig,
    MoEConfig,
    NoInjectionConfig,
    NormalInitConfig,
    RopeConfig,
    SwiGLUConfig,
    ZerosInitConfig,
)
from openmythos.interop.mapping import (
    AnyRule,
    Constant,
    Family,
    Join,
    Rename,
    Reshape,
    Shift,
    Split,
    check_fields,
)

ROTARY_CHUNKS = 16  # the length of their rotary table, in chunks of ``chunk_size`` tokens
TYPES = {
    **dict.fromkeys(("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim"), int),
    **dict.fromkeys(("ffn_hidden_dim", "vocab_size", "chunk_size", "loop_times"), int),
    **dict.fromkeys(("num_experts", "num_activated_experts", "expert_inter_dim"), int),
    **dict.fromkeys(("loop_start_layer", "loop_end_layers"), int),
    **dict.fromkeys(("huginn_prelude_layers", "huginn_coda_layers"), int),
    **dict.fromkeys(("rmsnorm_eps", "rope_base"), float),
    **dict.fromkeys(("arch", "loop_input_injection", "moe_router_score_func"), str),
    **dict.fromkeys(("huginn_state_init", "huginn_input_injection", "huginn_prelude_norm"), str),
    "huginn_recurrent_exit_norm": str,
    **dict.fromkeys(("scale_emb", "apply_bias_term", "huginn_prelude_orthogonal"), bool),
}
# The defaults of ``ModelConf`` for the fields above and below that their recipes leave out.
DEFAULTS = {
    "arch": "transformer",
    "chunk_size": 2048,
    "rmsnorm_eps": 1e-6,
    "rope_base": 100_000,
    "swiglu": False,
    "apply_rmsnorm": False,
    "scale_emb": False,
    "apply_bias_term": False,
    "huginn_prelude_orthogonal": False,
    "huginn_recurrent_exit_norm": "none",
    "num_experts": 0,
    "num_activated_experts": 0,
    "expert_inter_dim": 0,
    "moe_router_score_func": "sigmoid",
    "ffn_hidden_dim": 2048,
    "loop_times": 1,
    "loop_start_layer": 0,
    "loop_input_injection": "none",
    "huginn_prelude_layers": 1,
    "huginn_coda_layers": 1,
    "huginn_state_init": "zero",
    "huginn_input_injection": "diagonal",
    "huginn_prelude_norm": "none",
}
FIXED = {
    "swiglu": True,
    "apply_rmsnorm": True,
    "norm_affine": True,
    "layernorm_num_groups": 1,
    "qknorm": False,
    "attn_act_func": "softmax",
    "apply_attn_gate": False,
    "residual_func": "base",
    "output_size": -1,
    "num_values": 0,
    "num_shared_experts": 0,
    "moe_router_bias": False,
    "moe_router_scaling_factor": None,
    "loop_input_injection": "none",
    "dense_prelude_input_injection": "none",
    "huginn_hierarchical_state": "none",
    "huginn_ortho_projection_eps": 1e-6,
}
# Fields of training, initial values and kernels, and those that only an unsupported value reads.
SKIPPED = (
    *("ddp_backend", "causal_attn_backend", "sca_backend", "mova_backend", "timenorm_backend"),
    *("moe_expert_backend", "moe_permutation_backend", "causal_conv_backend"),
    *("dropout", "hidden_dropout", "attention_dropout", "layerwise_ckpt", "memory_efficient_norm"),
    *("init_mode", "init_std", "init_embed_std", "init_logits_std", "fused_block"),
    *("fused_output_layer", "recompute_q", "recompute_v", "recompute_attention", "recompute_awk"),
    *("recompute_fc1_out", "recompute_fc3_out", "recompute_router", "recompute_logits"),
    *("huginn_depth_control", "huginn_sampling_scheme", "huginn_antithetic_sampling"),
    *("huginn_poisson_lognormal_target_mean", "huginn_poisson_lognormal_sigma"),
    *("huginn_poisson_lognormal_max", "huginn_backprop_depth", "huginn_depth_prior"),
    *("huginn_depth_prior_entropy", "loop_diagonal_dt_init", "loop_diagonal_a_init"),
    *("huginn_diagonal_dt_init", "huginn_diagonal_a_init"),
    *("huginn_hierarchical_h_cycles", "huginn_hierarchical_l_cycles"),
    *("huginn_split_module_repeats", "dense_prelude_input_layers", "dense_prelude_source_layer"),
    *("dense_prelude_diagonal_dt_init", "dense_prelude_diagonal_a_init"),
    *("attn_gate_func", "awm_orthogonal_update", "residual_heads"),
    *("num_activated_values", "moe_router_bias_update_rate", "causal_conv_width"),
    *("causal_conv_weight_normalization", "timenorm_num_groups", "timenorm_beta1"),
    *("timenorm_beta2", "timenorm_eps", "layernorm_eps"),
)
CHECKED = ("rope_head_dim", "v_head_dim", "num_dense_layers", "huginn_recurrent_layers")
INJECTION = "input_injection"


# --- configs --------------------------------------------------------------------------------------


def recognises(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """By the section "model" in config.json and the head's name."""
    return isinstance(data.get("model"), Mapping) and "output.output.weight" in names


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read a ``ModelConf`` from the config.json of an artifact.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    given = check_fields(data, types={"model": dict}, skipped=("tokenizer",))["model"]
    f = check_fields(_filled(given), types=TYPES, fixed=FIXED, skipped=(*SKIPPED, *CHECKED))
    prelude, core, coda = _layers(f)
    checked = {
        "rope_head_dim": f["head_dim"],
        "v_head_dim": f["head_dim"],
        "num_dense_layers": 0 if f["num_experts"] else f["num_layers"],
        "huginn_recurrent_layers": core,
    }
    looks = {name: given[name] for name in checked if given.get(name) is not None}
    if f["arch"] != "huginn":
        looks.pop("huginn_recurrent_layers", None)
    check_fields(looks, types={}, fixed=checked)
    return ModelConfig(
        vocab_size=f["vocab_size"],
        d_model=f["model_dim"],
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        num_loops=f["loop_times"],
        attention=GQAConfig(
            num_heads=f["num_heads"], num_kv_heads=f["num_kv_heads"], head_dim=f["head_dim"]
        ),
        feed_forward=SwiGLUConfig(d_ff=f["ffn_hidden_dim"]),
        core_feed_forward=_experts_config(f, prelude + coda),
        max_seq_len=ROTARY_CHUNKS * f["chunk_size"],
        rope=RopeConfig(theta=f["rope_base"], interleaved=True),
        block=BlockConfig(norm="pre", norm_eps=f["rmsnorm_eps"]),
        **_recurrence(f),
        embed_scale=math.sqrt(f["model_dim"]) if f["scale_emb"] else 1.0,
        tie_embeddings=False,
    )


def _filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with their defaults for those that are absent or null."""
    f = {**DEFAULTS, **given}
    heads, dim = f.get("num_heads"), f.get("model_dim")
    if f.get("num_kv_heads") is None:
        f["num_kv_heads"] = heads
    if f.get("head_dim") is None and isinstance(heads, int) and isinstance(dim, int) and heads > 0:
        f["head_dim"] = dim // heads
    if f.get("loop_end_layers") is None:
        f["loop_end_layers"] = f.get("num_layers")
    if f.get("output_size") == f.get("vocab_size"):
        f["output_size"] = -1
    if f.get("residual_func") == "add":  # another name for "base"
        f["residual_func"] = "base"
    return f


def _layers(f: Mapping[str, Any]) -> tuple[int, int, int]:
    """The numbers of layers in prelude, core and coda."""
    total = f["num_layers"]
    if f["arch"] == "huginn":
        start, stop = f["huginn_prelude_layers"], total - f["huginn_coda_layers"]
    elif f["arch"] == "transformer":
        start, stop = f["loop_start_layer"], f["loop_end_layers"]
    else:
        allowed = "'transformer', 'huginn'"
        raise ValueError(f"config.json: arch is {f['arch']!r}; allowed: {allowed}")
    if not 0 <= start < stop <= total:
        raise ValueError(f"config.json: layers {start} to {stop} of {total} cannot be the loop")
    return start, stop - start, total - stop


def _experts_config(f: Mapping[str, Any], num_dense_layers: int) -> MoEConfig | None:
    if not f["num_experts"]:
        return None
    if num_dense_layers:
        raise ValueError(
            f"config.json: num_experts is {f['num_experts']}, in prelude and coda as well; here "
            "experts are supported in the loop only"
        )
    if f["num_activated_experts"] < 2:
        raise ValueError(
            f"config.json: num_activated_experts is {f['num_activated_experts']}; supported are 2 "
            "and more, whose weights sum to 1 in both codes"
        )
    return MoEConfig(
        num_experts=f["num_experts"],
        num_experts_per_token=f["num_activated_experts"],
        d_expert=f["expert_inter_dim"],
        num_shared_experts=0,
        scoring=f["moe_router_score_func"],
    )


def _recurrence(f: Mapping[str, Any]) -> dict[str, Any]:
    """Injection, initial state, and the norms before and after a loop."""
    plain = {
        "injection": NoInjectionConfig(),
        "state_init": CopyInitConfig(),
        "prelude_norm": False,
    }
    if f["arch"] == "transformer":
        return plain
    states = {
        "zero": ZerosInitConfig(),
        "input": CopyInitConfig(),
        "normal": NormalInitConfig(std=f["model_dim"] ** -0.5),
    }
    injections = {
        "none": NoInjectionConfig(),
        "diagonal": LTIInjectionConfig(orthogonal=f["huginn_prelude_orthogonal"]),
        "linear": LinearInjectionConfig(bias=f["apply_bias_term"]),
    }
    found = {
        "injection": _chosen(f, "huginn_input_injection", injections),
        "state_init": _chosen(f, "huginn_state_init", states),
        "prelude_norm": _chosen(f, "huginn_prelude_norm", {"none": False, "rms": True}),
        "loop_norm": _chosen(
            f, "huginn_recurrent_exit_norm", {"none": False, "parameterless_rms": True}
        ),
    }
    depth_control = found["prelude_norm"] or found["loop_norm"] or f["huginn_prelude_orthogonal"]
    if f["num_experts"] and (depth_control or f["huginn_input_injection"] == "linear"):
        raise ValueError(
            "config.json: num_experts is not 0; in their code a norm before or after a loop, the "
            "linear and the orthogonal injection need dense layers"
        )
    if found["injection"].adds_e and f["huginn_state_init"] == "input":
        raise ValueError(
            "config.json: huginn_state_init is 'input' with an injection: their state starts as "
            "the prelude's output itself, ours as what the injection makes of it"
        )
    return found


def _chosen(f: Mapping[str, Any], name: str, meanings: Mapping[str, Any]) -> Any:
    if f[name] not in meanings:
        words = ", ".join(map(repr, meanings))
        raise ValueError(f"config.json: {name} is {f[name]!r}; supported: {words}")
    return meanings[f[name]]


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as a ``ModelConf``, as their recipes write it."""
    attention, dense, rope = config.attention, config.feed_forward, config.rope
    if not (
        isinstance(attention, GQAConfig) and isinstance(dense, SwiGLUConfig) and rope is not None
    ):
        raise ValueError(
            "LoopedLM has grouped-query attention, SwiGLU and rotary positions; this model lacks "
            "one of them"
        )
    base = int(rope.theta) if rope.theta == int(rope.theta) else rope.theta
    model = {
        **FIXED,
        "num_layers": config.num_layers,
        "model_dim": config.d_model,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rope_head_dim": attention.head_dim,
        "rope_base": base,
        "chunk_size": config.max_seq_len // ROTARY_CHUNKS,
        "ffn_hidden_dim": dense.d_ff,
        "vocab_size": config.vocab_size,
        "rmsnorm_eps": config.block.norm_eps,
        "scale_emb": config.embed_scale != 1,
        "loop_times": config.num_loops,
    }
    experts = config.core_feed_forward
    if isinstance(experts, MoEConfig):
        model |= {
            "num_experts": experts.num_experts,
            "num_activated_experts": experts.num_experts_per_token,
            "expert_inter_dim": experts.d_expert,
            "moe_router_score_func": experts.scoring,
        }
    return {"model": model | _recurrence_fields(config)}


def _recurrence_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of the loop, of the architecture that has what the model needs."""
    prelude, core, coda = (
        config.num_prelude_layers,
        config.num_core_layers,
        config.num_coda_layers,
    )
    part, normed = config.injection, config.prelude_norm or config.loop_norm
    if isinstance(part, NoInjectionConfig) and not normed:
        return {
            "arch": "transformer",
            "loop_start_layer": prelude,
            "loop_end_layers": prelude + core,
        }
    states = {ZerosInitConfig: "zero", CopyInitConfig: "input", NormalInitConfig: "normal"}
    injections: dict[type, str] = {NoInjectionConfig: "none", LinearInjectionConfig: "linear"}
    linear = isinstance(part, LinearInjectionConfig)
    orthogonal = isinstance(part, LTIInjectionConfig) and part.orthogonal
    return {
        "arch": "huginn",
        "huginn_prelude_layers": prelude,
        "huginn_recurrent_layers": core,
        "huginn_coda_layers": coda,
        "huginn_state_init": states[type(config.state_init)],
        "huginn_input_injection": injections.get(type(part), "diagonal"),
        "apply_bias_term": isinstance(part, LinearInjectionConfig) and part.bias,
        "huginn_prelude_orthogonal": orthogonal,
        "huginn_prelude_norm": "rms" if config.prelude_norm else "none",
        "huginn_recurrent_exit_norm": "parameterless_rms" if config.loop_norm else "none",
        "huginn_depth_control": normed or orthogonal or linear,
    }


# --- weights --------------------------------------------------------------------------------------


def rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor; their layers are numbered through all stages."""
    found: list[AnyRule] = [
        Rename("embed.weight", "embed.weight"),
        Rename("output.output.weight", "head.weight"),
        Shift("output.final_norm.weight", "final_norm.weight"),
    ]
    if isinstance(config.injection, LTIInjectionConfig):
        found += [
            Rename(f"{INJECTION}.A_log", "injection.a_log"),
            Rename(f"{INJECTION}.dt_bias", "injection.dt_bias"),
            Rename(f"{INJECTION}.input_adapter.weight", "injection.weight"),
        ]
    if isinstance(config.injection, LinearInjectionConfig):
        parts = ("injection.h_weight", "injection.e_weight")
        found.append(Split(f"{INJECTION}.adapter.weight", parts, dim=1))
        if config.injection.bias:
            found.append(Rename(f"{INJECTION}.adapter.bias", "injection.bias"))
    if config.loop_norm:
        found.append(Constant("loop_norm.weight", (config.d_model,), 1.0))
    if config.prelude_norm:
        found.append(Shift("huginn_prelude_norm_module.weight", "prelude_norm.weight"))
    stages = {
        "prelude": config.num_prelude_layers,
        "core": config.num_core_layers,
        "coda": config.num_coda_layers,
    }
    names = [f"{stage}.{layer}" for stage, count in stages.items() for layer in range(count)]
    for number, ours in enumerate(names):
        found += _block(f"layers.{number}", ours, config)
    return found


def _block(theirs: str, ours: str, config: ModelConfig) -> list[AnyRule]:
    part, experts, a = config.attention, config.core_feed_forward, f"{theirs}.attention"
    assert isinstance(part, GQAConfig)
    q, kv = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
    found: list[AnyRule] = [
        Shift(f"{a}.norm.weight", f"{ours}.attention_norm.weight"),
        Join(
            tuple(f"{a}.w{name}.weight" for name in "qkv"),
            f"{ours}.attention.qkv.weight",
            sizes=(q, kv, kv),
        ),
        Rename(f"{a}.wo.weight", f"{ours}.attention.out.weight"),
    ]
    if isinstance(experts, MoEConfig):
        return found + _experts(f"{theirs}.moe", ours, config.d_model, experts)
    m, b = f"{theirs}.nffn", f"{ours}.feed_forward"
    return [
        *found,
        Shift(f"{m}.norm.weight", f"{ours}.feed_forward_norm.weight"),
        Join((f"{m}.fc1.weight", f"{m}.fc3.weight"), f"{b}.gate_up.weight"),
        Rename(f"{m}.fc2.weight", f"{b}.down.weight"),
    ]


def _experts(theirs: str, ours: str, d_model: int, part: MoEConfig) -> list[AnyRule]:
    a, b, count = f"{theirs}.experts", f"{ours}.feed_forward", part.num_experts
    return [
        Shift(f"{theirs}.norm.weight", f"{ours}.feed_forward_norm.weight"),
        Rename(f"{theirs}.router.weight", f"{b}.router.weight"),
        Constant(f"{b}.bias", (part.bias_loops, count), 0.0),
        Join((f"{a}.weight1", f"{a}.weight3"), f"{b}.gate_up", groups=count, stack=count),
        Reshape(
            f"{a}.weight2",
            f"{b}.down",
            their_shape=(count * d_model, part.d_expert),
            our_shape=(count, d_model, part.d_expert),
        ),
    ]


FAMILY = Family(
    name="IFM LoopedLM",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
)
