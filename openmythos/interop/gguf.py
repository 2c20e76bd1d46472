"""Convert a GGUF file of a Llama into a checkpoint folder under transformers' names.

Needs the gguf package. Quantised weights are dequantised to fp32. llama.cpp rotates neighbouring
channels (rotary positions), so GGUF files have the rows of q and k reordered; that is undone here.

Source: ggml-org/llama.cpp, gguf-py and convert_hf_to_gguf.py (LlamaModel.permute).
"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from openmythos.checkpoint.save import OWN_FILES, save_weights
from openmythos.checkpoint.weights import CONFIG_FILE
from openmythos.folder import PathLike, in_a_sentence, replaced_folder, write_json
from openmythos.tokenizer import Tokenizer

TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Pre-tokenisation (how text is cut before the BPE merges) by the value of tokenizer.ggml.pre.
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}
CONTROL, USER_DEFINED = 3, 4  # GGUF token types


def convert_gguf(path: PathLike, folder: PathLike) -> Path:
    """Write ``folder`` with config.json, model.safetensors and tokenizer.json; return its path.

    Raises:
        ValueError: The file does not exist, is not GGUF, or is not a Llama with a supported
            byte-level BPE tokenizer; or the package is missing.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give a .gguf file of a Llama")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file; give a .gguf file of a Llama")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {file} needs the gguf package: pip install gguf")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged: {in_a_sentence(error)}") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    try:
        config, tokenizer = _config(fields), _tokenizer(fields)
        weights = dict(_weights(reader.tensors, config))
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    with replaced_folder(folder, OWN_FILES) as fresh:
        save_weights(weights, fresh)
        write_json(fresh / CONFIG_FILE, config)
        tokenizer.save(fresh)
    return Path(folder)


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    kind = fields["general.architecture"]
    if kind != "llama":
        raise ValueError(f"general.architecture is {kind!r}; only 'llama' is read")
    scaled = [name for name in fields if name.startswith("llama.rope.scaling")]
    if scaled:
        raise ValueError(f"{', '.join(scaled)}: scaled rotary positions are not read from GGUF")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", width // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields.get("llama.rope.freq_base", 10_000.0),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def _weights(tensors: Any, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    from gguf import dequantize

    for tensor in tensors:
        name = OUTER.get(tensor.name)
        stem, _, leaf = tensor.name.removeprefix("blk.").partition(".")
        part = leaf.removesuffix(".weight")
        if tensor.name.startswith("blk.") and part in TENSORS:
            name = f"model.layers.{stem}.{TENSORS[part]}.weight"
        if name is None:
            raise ValueError(f"unknown tensor {tensor.name}")
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF: innermost first
        numbers = dequantize(tensor.data, tensor.tensor_type)  # fp32; a view if stored so
        wide = torch.tensor(numbers).reshape(shape)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
        yield name, wide if heads is None else _rotate_half_rows(wide, config[heads])


def _rotate_half_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder each head's rows so that rotary pairs (2j, 2j + 1) become (j, j + head_dim / 2)."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    kind, cut = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in CUTS:
        allowed = f"model 'gpt2' with pre {', '.join(map(repr, CUTS))}"
        raise ValueError(f"its tokenizer is {kind!r} with pre {cut!r}; allowed: {allowed}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = CUTS[cut]
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    for token, of_type in zip(tokens, types, strict=True):
        if of_type in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=of_type == CONTROL, normalized=False)
            add = backend.add_special_tokens if of_type == CONTROL else backend.add_tokens
            add([added])
    end = fields["tokenizer.ggml.eos_token_id"]
    return Tokenizer(
        backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[end],
        pad_token=tokens[fields.get("tokenizer.ggml.padding_token_id", end)],
    )
