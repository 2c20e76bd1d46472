"""The fields of config.json that all checkpoints written by transformers share."""

from collections.abc import Mapping
from typing import Any

from openmythos.config import Llama3ScalingConfig, RopeConfig
from openmythos.interop.mapping import check_fields

# Fields that every config class may have: labels, sampling, special tokens, dtypes. None of them
# changes a causal model's logits.
GENERIC_FIELDS = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype"),
        *("transformers_version", "use_bfloat16", "use_cache", "attn_implementation"),
        *("_attn_implementation_autoset", "problem_type", "task_specific_params", "torchscript"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "prefix"),
        *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("begin_suppress_tokens", "suppress_tokens", "bad_words_ids", "tokenizer_class"),
        *("finetuning_task", "id2label", "label2id", "num_labels", "tf_legacy_loss"),
        *("output_attentions", "output_hidden_states", "output_scores", "return_dict"),
        *("return_dict_in_generate", "chunk_size_feed_forward", "pruned_heads"),
        *("add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"),
        *("is_decoder", "is_encoder_decoder", "remove_invalid_values"),
        *("do_sample", "early_stopping", "max_length", "min_length", "temperature", "typical_p"),
        *("top_k", "top_p", "num_beams", "num_beam_groups", "num_return_sequences"),
        *("diversity_penalty", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    }
)
ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
LLAMA3_TYPES = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}


def read_rope(data: Mapping[str, Any]) -> RopeConfig:
    """The rotary positions of a Llama-type config: rotate-half, unscaled or with llama3 scaling.

    Transformers 5 writes one field ``rope_parameters``; older versions write ``rope_theta`` and
    ``rope_scaling``.

    Raises:
        ValueError: There is no theta, or the scaling is neither "default" nor "llama3".
    """
    scaling = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(
            f"config.json: the rope scaling is {scaling!r}, expected an object or null"
        )
    fields = {name: data[name] for name in ("rope_theta",) if name in data} | dict(scaling)
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)  # the old name, which some writers keep beside the new one
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope_type is {kind!r}; allowed: 'default', 'llama3'")
    types = {"rope_theta": float} | (LLAMA3_TYPES if kind == "llama3" else {})
    try:
        f = check_fields(fields, types=types)
    except ValueError as error:
        raise ValueError(f"{error} (of the rotary positions)") from None
    if kind == "default":
        return RopeConfig(theta=f["rope_theta"])
    scaled = Llama3ScalingConfig(
        factor=f["factor"],
        low_freq_factor=f["low_freq_factor"],
        high_freq_factor=f["high_freq_factor"],
        original_max_seq_len=f["original_max_position_embeddings"],
    )
    return RopeConfig(theta=f["rope_theta"], scaling=scaled)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The fields ``rope_theta`` and ``rope_scaling``, which every version of transformers reads."""
    part = rope.scaling
    if part is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling = {
        "rope_type": "llama3",
        "factor": part.factor,
        "low_freq_factor": part.low_freq_factor,
        "high_freq_factor": part.high_freq_factor,
        "original_max_position_embeddings": part.original_max_seq_len,
    }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
