"""Open a GGUF file of a Llama: its config, its tokenizer, and its weights one at a time.

Needs the gguf package. Quantised weights are dequantised to fp32. llama.cpp rotates neighbouring
channels (rotary positions), so GGUF files have the rows of q and k reordered; that is undone here.

Source: ggml-org/llama.cpp, gguf-py and convert_hf_to_gguf.py (LlamaModel: permute, rope_freqs).
"""

import atexit
import functools
import importlib.util
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmythos.checkpoint.weights import CONFIG_FILE, StoredWeights
from openmythos.config import Llama3ScalingConfig, RopeConfig
from openmythos.folder import PathLike, in_a_sentence, listed, write_json
from openmythos.interop.families.transformers_config import write_rope
from openmythos.interop.gguf_tokenizer import read_tokenizer
from openmythos.model.rope import rope_frequencies

SUFFIX = ".gguf"
PARTS_FIELD = "gguf_parts"  # in the config.json of an opened file: the paths of its parts
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
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
ROPE_FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by
# Llama 3.1's scaling: low and high factor, and the context before the scaling.
USUAL_SCALING = (1.0, 4.0, 8192)
CLOSE = 1e-5  # relative; the factors are stored in fp32


def open_gguf(path: PathLike) -> Path:
    """A temporary folder for a GGUF file, as one of transformers but without the weights.

    Its config.json names the file's parts, whose weights ``GgufWeights`` reads. Without a tokenizer
    that can be mapped exactly, it has none, with a warning. It lasts as long as this process.

    Args:
        path: The file; of a file that was split, any part, beside the others.

    Raises:
        ValueError: The file or a part does not exist, is damaged or is not a Llama's, or the
            package is missing.
    """
    parts = parts_of(Path(path))
    return _opened(parts, _stamps(parts))


def parts_of(file: Path) -> tuple[Path, ...]:
    """All parts of a split file, of which ``file`` is one; a file that is whole is its only part.

    Raises:
        ValueError: Parts are missing; names them.
    """
    found = PART_NAME.fullmatch(file.name)
    names = [file.name]
    if found:
        count = int(found[3])
        names = [f"{found[1]}-{n:05d}-of-{count:05d}{SUFFIX}" for n in range(1, count + 1)]
    parts = [file.with_name(name) for name in names]
    absent = [part.name for part in parts if not part.is_file()]
    if absent and len(parts) == 1:
        raise ValueError(f"{file} does not exist; give a {SUFFIX} file of a Llama")
    if absent:
        raise ValueError(f"{file} is one of {len(parts)} parts; missing: {listed(absent)}")
    return tuple(part.resolve() for part in parts)


def _stamps(parts: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    return tuple((part.stat().st_size, part.stat().st_mtime_ns) for part in parts)


@functools.lru_cache(maxsize=8)
def _opened(parts: tuple[Path, ...], stamps: object) -> Path:
    fields, tensors = _contents(parts, stamps)
    place = Path(tempfile.mkdtemp(prefix="openmythos-gguf-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = place / parts[0].name  # which errors name
    try:
        config = read_config(fields, tensors)
    except KeyError as error:
        raise ValueError(f"{parts[0]} lacks {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{parts[0]}: {error}") from None
    write_json(folder / CONFIG_FILE, {**config, PARTS_FIELD: [str(part) for part in parts]})
    try:
        read_tokenizer(fields).save(folder)
    except KeyError as error:
        warnings.warn(f"{parts[0]} has no tokenizer: it lacks {error.args[0]}", stacklevel=3)
    except ValueError as error:
        warnings.warn(f"the tokenizer of {parts[0]} is left out: {error}", stacklevel=3)
    return folder


@functools.lru_cache(maxsize=2)
def _contents(parts: tuple[Path, ...], stamps: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the first part, and the tensors of all parts by name, memory-mapped."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {parts[0]} needs the gguf package: pip install gguf")
    from gguf import GGUFReader

    fields: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for number, part in enumerate(parts):
        with part.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(f"{part} is not a GGUF file; give a {SUFFIX} file of a Llama")
        try:
            reader = GGUFReader(part)
            own = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, OSError) as error:
            raise ValueError(f"{part} is truncated or damaged: {in_a_sentence(error)}") from None
        place = own.get("split.no", 0), own.get("split.count", 1) or 1
        if place != (number, len(parts)):
            raise ValueError(
                f"{part} says that it is part {place[0] + 1} of {place[1]}, and its name that it "
                f"is part {number + 1} of {len(parts)}; give it the name that llama.cpp gave it"
            )
        fields = fields or own
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    expected = fields.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ValueError(f"{parts[0]} promises {expected} tensors; its parts hold {len(tensors)}")
    return fields, tensors


# --- config ---------------------------------------------------------------------------------------


def read_config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a Llama.

    Raises:
        KeyError: A field is missing.
        ValueError: It is no Llama, or its rotary positions cannot be expressed.
    """
    kind = fields["general.architecture"]
    if kind != "llama":
        raise ValueError(f"general.architecture is {kind!r}; only 'llama' is read")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    channels = fields.get("llama.attention.key_length") or width // heads
    theta = float(fields.get("llama.rope.freq_base", 10_000.0))
    tokens, end = fields.get("tokenizer.ggml.tokens", ()), "tokenizer.ggml.eos_token_id"
    embedding = tensors.get("token_embd.weight")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens) if embedding is None else int(embedding.shape[-1]),
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": channels,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        **write_rope(RopeConfig(theta=theta, scaling=_scaling(fields, tensors, channels, theta))),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id", fields.get(end)),
        "eos_token_id": fields.get(end),
    }


def _scaling(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], channels: int, theta: float
) -> Llama3ScalingConfig | None:
    """The scaling of the rotary frequencies that gives the factors in the file; None: unscaled.

    Raises:
        ValueError: No scaling of ours gives these factors.
    """
    neutral = {"type": "none", "factor": 1.0, "attn_factor": 1.0, "finetuned": False}
    named = {n: v for n, v in fields.items() if n.startswith("llama.rope.scaling.")}
    scaled = [n for n, v in named.items() if neutral.get(n.rpartition(".")[2], v) != v]
    if scaled:
        said = ", ".join(f"{name}={named[name]}" for name in scaled)
        raise ValueError(f"{said}: such scaled rotary positions are not supported")
    rotated = fields.get("llama.rope.dimension_count", channels)
    if rotated != channels:
        raise ValueError(f"rotary positions for {rotated} of {channels} channels are not supported")
    if ROPE_FACTORS not in tensors:
        return None
    factors = torch.tensor(tensors[ROPE_FACTORS].data).flatten().double()
    frequencies = rope_frequencies(channels, RopeConfig(theta=theta))
    if factors.shape == frequencies.shape:
        if bool((factors == 1).all()):
            return None
        for made in _candidates(factors, frequencies):
            found = frequencies / rope_frequencies(channels, RopeConfig(theta=theta, scaling=made))
            if torch.allclose(found, factors, rtol=CLOSE, atol=0):
                return made
    raise ValueError(f"the factors in {ROPE_FACTORS} are not those of Llama 3's scaling")


def _candidates(factors: Tensor, frequencies: Tensor) -> list[Llama3ScalingConfig]:
    """The usual scaling, and the one that the factors between the two limits imply.

    There the share that is kept is linear in the frequency, and only the ratios of the two limits
    and the context matter: the lower limit is set to its usual value.
    """
    factor = float(factors.max())
    low, high, length = USUAL_SCALING
    limits = [(low, high, length)]
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (kept > CLOSE) & (kept < 1 - CLOSE)
    if int(between.sum()) >= 2:
        x, y = frequencies[between], kept[between]
        slope = float((y[0] - y[-1]) / (x[0] - x[-1]))
        offset = float(y[-1] - slope * x[-1])
        if slope > 0 > offset:
            width = -low / offset  # the upper limit less the lower one
            length = max(1, round(2 * math.pi * slope * width))
            limits.append((low, round(low + width, 4), length))
            exact = length / (2 * math.pi * slope)
            limits.append((-offset * exact, (1 - offset) * exact, length))
    return [
        Llama3ScalingConfig(
            factor=factor, low_freq_factor=a, high_freq_factor=b, original_max_seq_len=n
        )
        for a, b, n in limits
    ]


# --- weights --------------------------------------------------------------------------------------


class GgufWeights(StoredWeights):
    """The weights of a GGUF file under transformers' names; each is dequantised when it is read.

    Args:
        parts: The file's parts.
        config: Its config, from ``read_config``.

    Raises:
        ValueError: A part is damaged, or there is a tensor that a Llama does not have.
    """

    def __init__(self, parts: Sequence[PathLike], config: Mapping[str, Any]) -> None:
        paths = tuple(Path(part) for part in parts)
        _, tensors = _contents(paths, _stamps(paths))
        self.folder, self._config = paths[0], config
        self._stored = {
            _their_name(name, paths[0]): tensor
            for name, tensor in tensors.items()
            if name != ROPE_FACTORS
        }
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))  # GGUF: innermost first
            for name, tensor in self._stored.items()
        }

    def strip(self, prefixes: tuple[str, ...]) -> None:
        """Nothing: the names are ours to choose."""

    def read(self, name: str) -> Tensor:
        """One tensor in fp32.

        Raises:
            ValueError: It has NaN or infinite elements, or its quantisation is unknown.
        """
        from gguf import dequantize

        stored = self._stored[name]
        try:
            numbers = dequantize(stored.data, stored.tensor_type)  # a view if stored so
        except RuntimeError:  # the package has no code for this type
            kind = stored.tensor_type.name
            raise ValueError(f"{self.folder}: {stored.name} has the unknown type {kind}") from None
        wide = torch.tensor(numbers).reshape(self.shapes[name])
        if not all(bool(limit.isfinite()) for limit in wide.aminmax()):
            raise ValueError(f"{self.folder}: {stored.name} holds NaN or infinite weights")
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                return rotate_half_rows(wide, self._config[heads])
        return wide


def _their_name(name: str, file: Path) -> str:
    layer, _, leaf = name.removeprefix("blk.").partition(".")
    part = leaf.removesuffix(".weight")
    if name.startswith("blk.") and leaf.endswith(".weight") and part in TENSORS:
        return f"model.layers.{layer}.{TENSORS[part]}.weight"
    if name not in OUTER:
        raise ValueError(f"{file}: unknown tensor {name}")
    return OUTER[name]


def rotate_half_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder each head's rows so that rotary pairs (2j, 2j + 1) become (j, j + head_dim / 2)."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
