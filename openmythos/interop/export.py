"""Export to Hugging Face transformers as a folder with its own modelling code, and back.

That code is copied from ``openmythos/interop/hf``. Neither writing nor reading a folder runs it or
needs transformers.
"""

import dataclasses
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from string import Template
from typing import Any

import torch

from openmythos import config as configs
from openmythos.checkpoint.load import empty_model
from openmythos.checkpoint.load import read_config as read_stored_config
from openmythos.checkpoint.save import own_files, write_companions
from openmythos.checkpoint.weights import CONFIG_FILE
from openmythos.config import GQAConfig, ModelConfig, counts
from openmythos.config.schema import from_dict, to_dict
from openmythos.folder import PathLike, replaced_folder, write_json, write_whole
from openmythos.interop.mapping import AnyRule, Family, Join, Rename, export_config
from openmythos.interop.writing import (
    MAX_SHARD_BYTES,
    check_writable,
    shard_names,
    write_weights,
)
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import (
    GENERATION_FILE,
    MERGES_FILE,
    SETTINGS_FILE,
    SPECIAL_NAMES,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
    read_facts,
)

MODEL_TYPE = "openmythos"
SOURCES = Path(__file__).parent / "hf"
CODE_FILES = tuple(
    f"{name}_openmythos.py" for name in ("configuration", "layers", "loop", "modeling")
)
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json"),
    *(VOCAB_FILE, MERGES_FILE, TEMPLATE_FILE),
)
CARD_FILE = "README.md"
SPECIAL_IDS = tuple(f"{name}_id" for name in SPECIAL_NAMES)
AUTO_MAP = {
    "AutoConfig": "configuration_openmythos.OpenMythosConfig",
    "AutoModel": "modeling_openmythos.OpenMythosModel",  # needed by vLLM
    "AutoModelForCausalLM": "modeling_openmythos.OpenMythosForCausalLM",
}

# --- config ---------------------------------------------------------------------------------------

RENAMED = {
    "d_model": "hidden_size",
    "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
# Fields that transformers adds or derives, and fields that do not change what the model computes.
SKIPPED = {
    *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version"),
    *SPECIAL_IDS,
    *("use_cache", "initializer_range", "state_seed", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "intermediate_size", "num_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
}
# The fields and members that the exported code supports; any other is refused.
COVERED: dict[type, Collection[str]] = {
    ModelConfig: (
        *("vocab_size", "d_model", "num_prelude_layers", "num_core_layers", "num_coda_layers"),
        *("num_loops", "attention", "feed_forward", "core_feed_forward", "max_seq_len", "rope"),
        *("block", "injection", "state_init", "loop_embedding", "loop_adapter", "halting"),
        *("value_embedding", "prelude_norm", "loop_norm", "readout", "final_norm", "embed_scale"),
        "tie_embeddings",
    ),
    configs.GQAConfig: (
        *("num_heads", "num_kv_heads", "head_dim", "qk_norm", "qk_norm_eps", "qk_bias"),
    ),
    configs.MLAConfig: (
        *("num_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
        "v_head_dim",
    ),
    configs.RopeConfig: ("theta", "interleaved", "scaling"),
    configs.Llama3ScalingConfig: (
        *("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"),
    ),
    configs.SwiGLUConfig: ("d_ff",),
    configs.ReLUSquaredConfig: ("d_ff", "scale"),
    configs.MoEConfig: (
        *("num_experts", "num_experts_per_token", "d_expert", "num_shared_experts", "d_shared"),
        *("scoring", "routed_scale", "bias_loops"),
    ),
    configs.BlockConfig: ("norm", "norm_eps", "layer_scale"),
    configs.LTIInjectionConfig: ("decay_init",),
    configs.OriginalLTIInjectionConfig: (),
    configs.LinearInjectionConfig: (),
    configs.AddInjectionConfig: (),
    configs.NoInjectionConfig: (),
    configs.GateInjectionConfig: ("bias_init",),
    configs.ZerosInitConfig: (),
    configs.CopyInitConfig: (),
    configs.NormalInitConfig: ("std",),
    configs.SinusoidalLoopConfig: ("num_channels", "theta"),
    configs.LearnedLoopConfig: ("num_loops",),
    configs.WeightLoRAConfig: ("rank", "num_loops"),
    configs.OutputLoRAConfig: ("rank", "num_loops"),
    configs.ACTConfig: ("threshold", "bias_init", "keep_remainder"),
    configs.PonderNetConfig: ("bias_init",),
    configs.ExitGateConfig: ("bias_init",),
    configs.ValueEmbeddingConfig: ("layers", "gate_channels"),
}


def check_covered(config: ModelConfig) -> None:
    """Check that the exported code supports the model.

    Raises:
        ValueError: It does not; lists what is not supported.
    """
    if found := _uncovered(config, ""):
        raise ValueError(
            f"the Hugging Face export does not cover {', '.join(found)}; train without that, or "
            "keep the checkpoint in our own format"
        )


def _uncovered(part: Any, path: str) -> list[str]:
    if type(part) not in COVERED:
        return [f"{path} of kind {part.kind!r}"]
    found = []
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{path}.{field.name}" if path else field.name
        if field.name not in COVERED[type(part)]:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if value != default:
                found.append(f"{name}={value!r}")
        elif dataclasses.is_dataclass(value):
            found += _uncovered(value, name)
    return found


def recognises(data: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether config.json is that of an export, by its ``model_type``."""
    return data.get("model_type") == MODEL_TYPE


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """Read the config.json of an export, written here or by transformers' ``save_pretrained``.

    Raises:
        ValueError: Fields are missing, unknown or wrong.
    """
    ours = {their_name: our_name for our_name, their_name in RENAMED.items()}
    # transformers leaves out fields that have its own default.
    fields = {"tie_word_embeddings": True, **data}
    kept = {ours.get(k, k): value for k, value in fields.items() if k not in SKIPPED}
    return from_dict(ModelConfig, kept)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The model's fields under transformers' names."""
    return {RENAMED.get(name, name): value for name, value in to_dict(config).items()}


# --- weights --------------------------------------------------------------------------------------

# Replacements that turn our names into transformers' usual names, applied in this order.
NAMES = (
    (r"^head\.", "lm_head."),
    (r"^(?!lm_head\.)", "model."),
    (r"^model\.embed\.", "model.embed_tokens."),
    (r"^model\.final_norm\.", "model.norm."),
    (r"^model\.halting\.proj\.", "model.halting."),
    (r"\.attention\.(q|kv)_norm\.", r".attention.\1_latent_norm."),
    (r"\.attention\.(q|k)_norm_weight$", r".attention.\1_norm.weight"),
    (r"\.attention\.down\.", ".attention.qkv_down."),
    (r"\.attention\.out\.", ".attention.o."),
    (r"\.attention\.", ".self_attn."),
    (r"\.feed_forward\.router\.", ".mlp.gate."),
    (r"\.feed_forward\.bias$", ".mlp.gate.selection_bias"),
    (r"\.feed_forward\.(gate_up|down)$", r".mlp.experts.\1_proj"),
    (r"\.feed_forward\.shared\.", ".mlp.shared_experts."),
    (r"\.feed_forward\.", ".mlp."),
    (r"\.lora_(down|up)$", r"_lora.\1"),
    (
        r"(attn|mlp|experts)\.(qkv|o|qkv_down|q_up|kv_up|gate_up|up|down)\.weight$",
        r"\1.\2_proj.weight",
    ),
)


def rules(config: ModelConfig) -> list[AnyRule]:
    """The rules of every tensor; our fused matrices are split, as inference engines expect."""
    return [_rule(name, config) for name in empty_model(config).state_dict()]


def _rule(ours: str, config: ModelConfig) -> AnyRule:
    theirs = ours
    for pattern, name in NAMES:
        theirs = re.sub(pattern, name, theirs)
    part = config.attention
    if isinstance(part, GQAConfig):
        q, kv = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
        if ours.endswith(".qkv.weight"):
            parts = tuple(theirs.replace("qkv_proj", f"{letter}_proj") for letter in "qkv")
            return Join(parts, ours, sizes=(q, kv, kv))
        if ours.endswith(".qk_bias"):
            parts = tuple(theirs.replace("qk_bias", f"{letter}_proj.bias") for letter in "qk")
            return Join(parts, ours, sizes=(q, kv), stack=part.num_heads + part.num_kv_heads)
    if ours.endswith(".gate_up.weight"):
        parts = tuple(theirs.replace("gate_up_proj", f"{name}_proj") for name in ("gate", "up"))
        return Join(parts, ours)
    return Rename(theirs, ours)


FAMILY = Family(
    name="the Hugging Face export",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
)

# --- the folder -----------------------------------------------------------------------------------


def export_hf(
    model: RecurrentDepthLM,
    folder: PathLike,
    *,
    tokenizer: Tokenizer | PathLike | None = None,
    dtype: torch.dtype | None = None,
    num_loops: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a folder that transformers opens with ``trust_remote_code=True``; return its path.

    Args:
        model: A model with weights.
        folder: The folder to write; an earlier export in it is replaced as a whole.
        tokenizer: A tokenizer of ours, or a folder whose tokenizer files are copied.
        dtype: Dtype of the written parameters; None keeps theirs.
        num_loops: The default depth, which is also the deepest with a cache; None: the model's.
        max_shard_bytes: Maximum size of one weight file; a larger model is split.
        companions: Contents of other files to write beside the weights, by name.

    Raises:
        ValueError: The exported code does not support the model, an argument is out of range, or
            the folder holds something else. Nothing is written then.
    """
    config = model.config
    if num_loops is not None:
        config = dataclasses.replace(config, num_loops=num_loops)
    check_covered(config)
    check_writable(model, dtype)
    written = export_config(FAMILY, config)
    with replaced_folder(folder, _own_files(Path(folder))) as fresh:
        said = {} if tokenizer is None else _write_tokenizer(tokenizer, fresh, config)
        ids = {name: said[name] for name in SPECIAL_IDS if name in said}
        write_weights(FAMILY, model, fresh, dtype=dtype, max_shard_bytes=max_shard_bytes)
        stored = dtype or model.embed.weight.dtype
        head = {
            "architectures": ["OpenMythosForCausalLM"],
            "auto_map": AUTO_MAP,
            "model_type": MODEL_TYPE,
            "dtype": str(stored).removeprefix("torch."),
        }
        write_json(fresh / CONFIG_FILE, {**head, **written, **ids})
        write_json(fresh / GENERATION_FILE, {"do_sample": False, **said})
        for name in CODE_FILES:
            shutil.copyfile(SOURCES / name, fresh / name)
        write_whole(fresh / CARD_FILE, _card(config))
        write_companions(companions or {}, fresh)
    return Path(folder)


def _own_files(target: Path) -> set[str]:
    """File names that an earlier export may have.

    Raises:
        ValueError: The folder holds another kind of checkpoint.
    """
    if (target / CONFIG_FILE).is_file() and read_stored_config(target).get(
        "model_type"
    ) != MODEL_TYPE:
        raise ValueError(
            f"{target} holds a checkpoint that is no export: it would be replaced; choose another"
        )
    return {
        *own_files(target),
        *CODE_FILES,
        *TOKENIZER_FILES,
        *(CARD_FILE, GENERATION_FILE),
        *shard_names(target),
    }


def _write_tokenizer(
    tokenizer: Tokenizer | PathLike, fresh: Path, config: ModelConfig
) -> dict[str, Any]:
    """Write the tokenizer's files; return the fields of its generation_config.json.

    Special tokens' ids are among them.
    """
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(fresh)
        # What another project's tokenizer does with text must stay as it is.
        made_here = {
            **tokenizer.names,
            "split_special_tokens": True,  # never parse special tokens in text
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_seq_len,
            **(tokenizer.settings or made_here),
        }
        write_json(fresh / SETTINGS_FILE, settings)
        own = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        return {**dict(zip(SPECIAL_IDS, own, strict=True)), **tokenizer.generation}
    source = Path(tokenizer)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, fresh / name)
    facts = read_facts(source)
    ids = {name: value for name, value in facts.ids.items() if value is not None}
    return {**ids, **facts.generation}


def _card(config: ModelConfig) -> str:
    """The model card as Markdown."""
    template = Template((SOURCES / "model_card.md").read_text(encoding="utf-8"))
    experts = config.core_ff
    shape = (
        f"{config.num_prelude_layers} prelude, {config.num_core_layers} core and "
        f"{config.num_coda_layers} coda layers of width {config.d_model}, {config.attention.kind} "
        f"attention, {experts.kind} feed-forward in the core"
    )
    return template.substitute(
        total=f"{counts.count(config).total_params:,}",
        shape=shape,
        num_loops=config.num_loops,
        deeper=2 * config.num_loops,
        depth=config.effective_depth(),
        slots=config.effective_depth(),
        max_seq_len=f"{config.max_seq_len:,}",
    )
