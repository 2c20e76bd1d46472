"""Write a checkpoint under a family's names as safetensors files, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmythos.checkpoint.load import empty_model
from openmythos.checkpoint.save import own_files, require_stored, write_companions
from openmythos.checkpoint.weights import CONFIG_FILE, INDEX_FILES, WEIGHTS_FILE
from openmythos.folder import PathLike, replaced_folder, whole_file, write_json
from openmythos.interop.mapping import (
    Dead,
    Family,
    Recomputed,
    Rule,
    TiedCopy,
    export_config,
    export_tensors,
)
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9  # a larger model is split into several files
SHARD_PATTERN = "model-*-of-*.safetensors"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def save_as(
    family: Family,
    model: RecurrentDepthLM,
    folder: PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model as a checkpoint of a family, atomically, and return the folder.

    Args:
        family: The family whose names and config are written.
        model: A model with weights.
        folder: The folder to write; a checkpoint in it is replaced as a whole.
        tokenizer: A tokenizer to write beside the weights, if any.
        dtype: Dtype of the written parameters; None keeps theirs.
        max_shard_bytes: Maximum size of one file, unless a single tensor is larger.
        companions: Contents of other files to write beside the weights, by name.

    Raises:
        ValueError: The family cannot express the model, or the folder holds something else.
            Nothing is written then.
    """
    config = export_config(family, model.config)
    check_writable(model, dtype)
    with replaced_folder(folder, own_files(folder) | shard_names(folder)) as fresh:
        write_json(fresh / CONFIG_FILE, config)
        write_weights(family, model, fresh, dtype=dtype, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(fresh)
        write_companions(companions or {}, fresh)
    return Path(folder)


def shard_names(folder: PathLike) -> set[str]:
    """File names of sharded weights in ``folder``, which a new checkpoint may replace."""
    return {INDEX_FILES[0], *(path.name for path in Path(folder).glob(SHARD_PATTERN))}


def check_writable(model: RecurrentDepthLM, dtype: torch.dtype | None) -> None:
    """Check that ``write_weights`` can write the model.

    Raises:
        ValueError: The model has no weights or has them in 8 bits, or the dtype is not supported.
    """
    require_stored(model)
    for found in {dtype or model.embed.weight.dtype, model.embed.weight.dtype}:
        if found not in DTYPE_NAMES:
            allowed = ", ".join(str(known) for known in DTYPE_NAMES)
            raise ValueError(f"dtype is {found}; a checkpoint may have {allowed}")


@dataclass(frozen=True)
class Planned:
    """A tensor that is going to be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its numbers in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@torch.no_grad()
def write_weights(
    family: Family,
    model: RecurrentDepthLM,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights, holding only one rule's result in memory besides the model.

    Buffers keep their dtype, because a narrow one would lose the small steps of a router's bias.
    """
    ours, buffers = model.state_dict(), dict(model.named_buffers())
    dtypes = {
        name: tensor.dtype if dtype is None or name in buffers else dtype
        for name, tensor in ours.items()
    }
    rules = _writing_rules(family, model, dtypes)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in ours.items()}
    plan = [Planned(n, t.dtype, tuple(t.shape)) for n, t in _stream(rules, shapes, dtypes)]
    shards, tensors = _shards(plan, max_shard_bytes), _stream(rules, ours, dtypes)
    if len(shards) == 1:
        _write_file(folder / WEIGHTS_FILE, shards[0], tensors)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, tensors)
        places |= {planned.name: name for planned in shard}
    size = sum(planned.num_bytes for planned in plan)
    write_json(folder / INDEX_FILES[0], {"metadata": {"total_size": size}, "weight_map": places})


# A rule, and for each of its tensors that is written: the rule's name to the name in the file.
WritingRule = tuple[Rule | Dead, Mapping[str, str]]


def _writing_rules(
    family: Family, model: RecurrentDepthLM, dtypes: Mapping[str, torch.dtype]
) -> list[WritingRule]:
    """The rules that write something, in order of falling item size.

    So every tensor in a file starts at a multiple of its item size, which memory mapping needs.
    """
    export_tensors(family, empty_model(model.config))  # raises if one of ours is unused
    rules = family.rules(model.config)
    plain = [rule for rule in rules if not isinstance(rule, TiedCopy | Recomputed | Dead)]
    makers = {name: rule for rule in plain for name in rule.theirs}
    found: list[WritingRule] = [(rule, {name: name for name in rule.theirs}) for rule in plain]
    tied = [rule for rule in rules if isinstance(rule, TiedCopy)]
    found += [(makers[rule.of], {rule.of: rule.their_name}) for rule in tied]
    found += [(rule, {}) for rule in rules if isinstance(rule, Dead)]
    return sorted(found, key=lambda entry: -_dtype_of(entry[0], dtypes).itemsize)


def _dtype_of(rule: Rule | Dead, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of a rule's tensors; that of the embedding for a dead parameter."""
    return dtypes["embed.weight" if isinstance(rule, Dead) else rule.ours[0]]


def _stream(
    rules: Sequence[WritingRule],
    ours: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[tuple[str, Tensor]]:
    for rule, names in rules:
        if isinstance(rule, Dead):
            numbers = ours["embed.weight"].new_zeros(rule.their_shape)
            yield rule.their_name, numbers.to(_dtype_of(rule, dtypes))
            continue
        parts = rule.write([ours[name].to(dtypes[name]) for name in rule.ours])
        for theirs, tensor in zip(rule.theirs, parts, strict=True):
            if theirs in names:
                yield names[theirs], tensor


def _shards(plan: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        if shards[-1] and size + planned.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.num_bytes
    return shards


def _write_file(
    path: Path, shard: Sequence[Planned], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write the next tensors as one file: the header's length, the header as JSON, the numbers.

    Source: safetensors, README.md, Format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for planned in shard:
        start, stop = stop, stop + planned.num_bytes
        header[planned.name] = {
            "dtype": DTYPE_NAMES[planned.dtype],
            "shape": planned.shape,
            "data_offsets": (start, stop),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for planned, (name, tensor) in zip(shard, tensors, strict=False):
            assert (planned.name, planned.shape) == (name, tuple(tensor.shape))
            numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.write(numbers.numpy().data)
