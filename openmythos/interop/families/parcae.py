"""Parcae and the GPT baselines that were published with it (sandyresearch/parcae).

The baselines are the case T = 1: all their layers form the core, which runs once, no injection.

Source: https://github.com/sandyresearch/parcae at dee8363; Parcae (arXiv 2604.12946), section 3.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from openmythos.config import (
    BlockConfig,
    CopyInitConfig,
    GQAConfig,
    LTIInjectionConfig,
    ModelConfig,
    NoInjectionConfig,
    NormalInitConfig,
    ReLUSquaredConfig,
    RopeConfig,
    StateInitConfig,
    ValueEmbeddingConfig,
    ZerosInitConfig,
)
from openmythos.interop.mapping import (
    AnyRule,
    Dead,
    Family,
    Join,
    Recomputed,
    Rename,
    TiedCopy,
    check_fields,
)

QK_EPS = 2.0**-23  # float32's machine epsilon, torch's default for a norm without eps
GATE_CHANNELS = 32
ROPE_BASE = 50_000
STAGES = {"prelude": "prelude", "core_block": "core", "coda": "coda"}
SHARED_TYPES = {
    **dict.fromkeys(("n_embd", "intermediate_size", "vocab_size", "block_size"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "padding_multiple"), int),
    **dict.fromkeys(("norm_class_name", "nonlin_name", "init_strategy"), str),
    **dict.fromkeys(("qk_norm", "tie_embeddings"), bool),
    "norm_eps": float,
}
LOOP_TYPES = {
    **dict.fromkeys(("n_layers_in_prelude", "n_layers_in_recurrent_block"), int),
    **dict.fromkeys(("n_layers_in_coda", "mean_recurrence", "mean_backprop_depth"), int),
    "recurrent_embedding_dimension": int,
    "recurrent_intermediation_embedding_dimension": int,
    "prelude_norm": bool,
    **dict.fromkeys(("state_init", "injection_type"), str),
}
FIXED = {
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "ReLU2",
    "init_strategy": "scaled-zero",  # others scale embedding and logits
    "bias": False,
    "qk_bias": False,
    "clip_qkv": None,
    "logit_softcap": None,
    "mup_model_scaling_factor": 1,
    "randomize_positions_from": None,
    "use_abacus": False,
    "debias_attention": False,
    "center_attention": False,
}
# Fields that are read elsewhere (the second line) or do not change what the model computes.
SKIPPED = (
    *("name", "hf_config", "_class_name", "architecture_class_name", "model_class_name"),
    *("padded_vocab_size", "rope_settings", "recurrent_num_attention_heads"),
    *("attn_impl", "use_fused_head", "init_orthogonal", "skip_initialization", "simple_ops"),
    *("strategy", "activation_checkpoint_impl", "sampling_scheme", "curriculum_target"),
    *("lockstep_n", "lockstep_k", "recurrent_iteration_method"),
)


# --- configs --------------------------------------------------------------------------------------


def recognises(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether this is Parcae: a config field that the similar Huginn lacks, and the core's name."""
    fields = {"n_layers_in_recurrent_block", "recurrent_embedding_dimension"} <= data.keys()
    return fields and any("transformer.core_block." in name for name in names)


def recognises_gpt(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether this is a GPT baseline: config fields that GPT-2 lacks, and the layers' names."""
    fields = {"n_layer", "nonlin_name", "block_size"} <= data.keys()
    return fields and any("transformer.h." in name for name in names)


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read a ParcaeConfig.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    f = check_fields(
        data,
        types=SHARED_TYPES | LOOP_TYPES,
        fixed=FIXED | {"injection_type": "diagonal"},
        skipped=SKIPPED,
    )
    dim, loops = f["n_embd"], f["mean_recurrence"]
    layers = (f["n_layers_in_prelude"], f["n_layers_in_recurrent_block"], f["n_layers_in_coda"])
    _expect(data, "recurrent_embedding_dimension", dim)
    _expect(data, "recurrent_num_attention_heads", f["num_attention_heads"])
    width = f["recurrent_intermediation_embedding_dimension"]
    core = ReLUSquaredConfig(d_ff=width, scale=0.5) if width != f["intermediate_size"] else None
    gates = _gates(layers, loops, f["mean_backprop_depth"])
    return ModelConfig(
        **_shared(data, f, _tables(sum(layers)) & gates),
        num_prelude_layers=layers[0],
        num_core_layers=layers[1],
        num_coda_layers=layers[2],
        num_loops=loops,
        core_feed_forward=core,
        injection=LTIInjectionConfig(),
        state_init=_state_init(f["state_init"], dim),
        prelude_norm=f["prelude_norm"],
        readout="linear",
    )


def read_gpt_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read the config of a GPT baseline.

    Raises:
        ValueError: Fields are missing, unknown or not supported.
    """
    types = SHARED_TYPES | {"n_layer": int}
    f = check_fields(data, types=types, fixed=FIXED, skipped=SKIPPED)
    return ModelConfig(
        **_shared(data, f, _tables(f["n_layer"])),
        num_prelude_layers=0,
        num_core_layers=f["n_layer"],
        num_coda_layers=0,
        num_loops=1,
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
        prelude_norm=False,
    )


def _shared(data: Mapping[str, Any], f: Mapping[str, Any], valued: set[int]) -> dict[str, Any]:
    """The fields that both share; ``valued`` are the layers with value embeddings."""
    dim, heads = f["n_embd"], f["num_attention_heads"]
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"config.json: num_attention_heads={heads} must divide n_embd={dim}")
    _expect(data, "num_key_value_heads", heads)
    tables = ValueEmbeddingConfig(layers=tuple(sorted(valued)), gate_channels=GATE_CHANNELS)
    return {
        "vocab_size": _padded_vocab_size(data, f),
        "d_model": dim,
        "attention": GQAConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=dim // heads,
            qk_norm="weightless" if f["qk_norm"] else "none",
            qk_norm_eps=QK_EPS if f["qk_norm"] else None,
        ),
        "feed_forward": ReLUSquaredConfig(d_ff=f["intermediate_size"], scale=0.5),
        "max_seq_len": f["block_size"],
        "rope": _rope(data.get("rope_settings") or {}),
        "block": BlockConfig(norm="pre", norm_eps=f["norm_eps"]),
        "value_embedding": tables if valued else None,
        "tie_embeddings": f["tie_embeddings"],
    }


def _rope(given: object) -> RopeConfig:
    if not isinstance(given, Mapping):
        raise ValueError(f"config.json: rope_settings is {given!r}, expected an object")
    plain = {"use_rope": True, "rope_condense_ratio": 1}
    f = check_fields({"rope_base": ROPE_BASE, **given}, types={"rope_base": float}, fixed=plain)
    return RopeConfig(theta=f["rope_base"], interleaved=True)


def _padded_vocab_size(data: Mapping[str, Any], f: Mapping[str, Any]) -> int:
    size, multiple = f["vocab_size"], f["padding_multiple"]
    padded = data.get("padded_vocab_size")
    if padded is None:
        if multiple < 1:
            raise ValueError(f"config.json: padding_multiple is {multiple}; it must be at least 1")
        return -(-size // multiple) * multiple
    if type(padded) is not int or padded < size:
        allowed = f"an integer of at least vocab_size={size}"
        raise ValueError(f"config.json: padded_vocab_size is {padded!r}; it must be {allowed}")
    return padded


def _expect(data: Mapping[str, Any], name: str, value: int) -> None:
    if data.get(name) not in (None, value):
        raise ValueError(f"config.json: {name} is {data[name]!r}; only {value} is supported here")


def _state_init(word: str, dim: int) -> StateInitConfig:
    if word == "zero":
        return ZerosInitConfig()
    if word == "like-init":
        return NormalInitConfig(std=math.sqrt(2 / (5 * dim)))  # that of their weights
    raise ValueError(f"config.json: state_init is {word!r}; supported: 'like-init', 'zero'")


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as a ParcaeConfig, with the training fields of the published models."""
    core_width = getattr(config.core_ff, "d_ff", None)
    zero = isinstance(config.state_init, ZerosInitConfig)
    return {
        **_written(config),
        "_class_name": "ParcaeConfig",
        "n_layers_in_prelude": config.num_prelude_layers,
        "n_layers_in_recurrent_block": config.num_core_layers,
        "n_layers_in_coda": config.num_coda_layers,
        "mean_recurrence": config.num_loops,
        "mean_backprop_depth": _backprop_depth(config),
        "recurrent_embedding_dimension": config.d_model,
        "recurrent_intermediation_embedding_dimension": core_width,
        "prelude_norm": config.prelude_norm,
        "state_init": "zero" if zero else "like-init",
        "injection_type": "diagonal",
        "sampling_scheme": "poisson-truncated-full",
        "recurrent_iteration_method": "per-sequence",
    }


def write_gpt_config(config: ModelConfig) -> dict[str, Any]:
    """Write our config as that of a GPT baseline."""
    return {**_written(config), "n_layer": config.num_layers}


def _written(config: ModelConfig) -> dict[str, Any]:
    attention, dense, rope = config.attention, config.feed_forward, config.rope
    if not (
        isinstance(attention, GQAConfig)
        and isinstance(dense, ReLUSquaredConfig)
        and isinstance(config.core_ff, ReLUSquaredConfig)
        and rope is not None
    ):
        raise ValueError(
            "Parcae has multi-head attention, rotary positions and ReLU^2 feed-forwards; this "
            "model lacks one of them"
        )
    base = int(rope.theta) if rope.theta == int(rope.theta) else rope.theta
    return {
        **FIXED,
        "name": "parcae",
        "init_orthogonal": True,
        "n_embd": config.d_model,
        "intermediate_size": dense.d_ff,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "padding_multiple": 64,
        "block_size": config.max_seq_len,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "qk_norm": attention.qk_norm == "weightless",
        "norm_eps": config.block.norm_eps,
        "tie_embeddings": config.tie_embeddings,
        "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": base},
    }


# --- value embeddings -----------------------------------------------------------------------------
# In Parcae's code, two independent rules decide which layers have a table and which have a gate. A
# layer uses value embeddings only if it has both; a table or gate alone is a dead parameter.


def _layers(config: ModelConfig) -> tuple[int, int, int]:
    return config.num_prelude_layers, config.num_core_layers, config.num_coda_layers


def _tables(num_layers: int) -> set[int]:
    """Layers with a table: the last one and every second before it."""
    return {layer for layer in range(num_layers) if (num_layers - 1 - layer) % 2 == 0}


def _gates(layers: tuple[int, int, int], loops: int, backprop_depth: int) -> set[int]:
    """Layers with a gate, by the parity of a number that counts the core once per loop.

    Coda layers are numbered after all loops; a gate's parity is that of the last layer among those
    of the core's ``backprop_depth`` loops.
    """
    prelude, core, coda = layers
    numbers = [
        *range(prelude + core),
        *range(prelude + core * loops, prelude + core * loops + coda),
    ]
    parity = (core * backprop_depth - 1) % 2
    return {layer for layer, number in enumerate(numbers) if number % 2 == parity}


def _backprop_depth(config: ModelConfig) -> int:
    """The backprop depth that gives these value embeddings: half of the loops, or one more.

    Raises:
        ValueError: Neither depth gives them.
    """
    layers = _layers(config)
    used = set(config.value_embedding.layers) if config.value_embedding else set()
    usual = (config.num_loops + 1) // 2
    for depth in (usual, usual + 1):
        if _tables(sum(layers)) & _gates(layers, config.num_loops, depth) == used:
            return depth
    raise ValueError(f"value_embedding.layers are {sorted(used)}: Parcae has no such choice")


# --- weights --------------------------------------------------------------------------------------


def rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor of a Parcae model."""
    gates = _gates(_layers(config), config.num_loops, _backprop_depth(config))
    names = [
        (f"transformer.{theirs}.{i}", f"{ours}.{i}")
        for (theirs, ours), count in zip(STAGES.items(), _layers(config), strict=True)
        for i in range(count)
    ]
    found = [
        *_ends(config),
        Rename("transformer.adapter.A_log", "injection.a_log"),
        Rename("transformer.adapter.dt_bias", "injection.dt_bias"),
        Rename("transformer.adapter.B", "injection.weight"),
        Rename("transformer.C.weight", "readout.weight"),
    ]
    if config.prelude_norm:
        found.append(Rename("transformer.ln_prelude.weight", "prelude_norm.weight"))
    for layer, (theirs, ours) in enumerate(names):
        found += _block(theirs, ours)
        found += _value_embedding(config, layer, theirs, ours, gated=layer in gates)
    return found


def gpt_rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor of a GPT baseline."""
    found, gates = list(_ends(config)), _tables(config.num_layers)
    for layer in range(config.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"core.{layer}"
        found += _block(theirs, ours)
        found += _value_embedding(config, layer, theirs, ours, gated=layer in gates)
    return found


def _ends(config: ModelConfig) -> Iterator[AnyRule]:
    yield Rename("transformer.wte.weight", "embed.weight")
    if config.tie_embeddings:
        yield TiedCopy("lm_head.weight", of="transformer.wte.weight")
    else:
        yield Rename("lm_head.weight", "head.weight")
    yield Rename("transformer.ln_f.weight", "final_norm.weight")
    yield Recomputed("freqs_cis")


def _block(theirs: str, ours: str) -> list[AnyRule]:
    qkv = tuple(f"{theirs}.attn.{name}.weight" for name in ("c_q", "c_k", "c_v"))
    return [
        Rename(f"{theirs}.norm_1.weight", f"{ours}.attention_norm.weight"),
        Join(qkv, f"{ours}.attention.qkv.weight"),
        Rename(f"{theirs}.attn.c_proj.weight", f"{ours}.attention.out.weight"),
        Rename(f"{theirs}.norm_2.weight", f"{ours}.feed_forward_norm.weight"),
        Rename(f"{theirs}.mlp.fc.weight", f"{ours}.feed_forward.up.weight"),
        Rename(f"{theirs}.mlp.proj.weight", f"{ours}.feed_forward.down.weight"),
    ]


def _value_embedding(
    config: ModelConfig, layer: int, theirs: str, ours: str, *, gated: bool
) -> Iterator[AnyRule]:
    part = config.attention
    assert isinstance(part, GQAConfig)
    table, gate = f"value_embeds.{layer}.weight", f"{theirs}.attn.ve_gate.weight"
    tabled = layer in _tables(config.num_layers)
    if tabled and gated:
        yield Rename(table, f"{ours}.attention.value_table.weight")
        yield Rename(gate, f"{ours}.attention.value_gate.weight")
    elif tabled:
        yield Dead(table, (config.vocab_size, part.num_kv_heads * part.head_dim))
    elif gated:
        yield Dead(gate, (part.num_kv_heads, GATE_CHANNELS))


PREFIXES = ("module.", "_orig_mod.", "model.")  # as Parcae's evaluation program strips
FAMILY = Family(
    name="Parcae",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
    prefixes=PREFIXES,
)
GPT_FAMILY = Family(
    name="Parcae GPT",
    recognises=recognises_gpt,
    read_config=read_gpt_config,
    write_config=write_gpt_config,
    rules=gpt_rules,
    prefixes=PREFIXES,
)
