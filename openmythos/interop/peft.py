"""Adapters in PEFT's format under any names: merged into a model, and written under a family's.

A family's rules say where its numbers are in our matrices. They are linear: they move the product
of a change's two matrices, and of a change of rows its up-projection alone.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from openmythos.checkpoint.load import empty_model, fill_model
from openmythos.checkpoint.save import save_tensors
from openmythos.checkpoint.weights import ADAPTER_CONFIG, ADAPTER_FILE, read_json, tensor_shapes
from openmythos.config import ModelConfig, WeightLoRAConfig
from openmythos.folder import PathLike, listed, replaced_folder, write_json
from openmythos.interop import export
from openmythos.interop.adapter import (
    DIGEST,
    DOWN,
    PER_LOOP,
    PREFIX,
    UP,
    base_digest,
    check_base,
    layers,
    open_adapter,
    weights_digest,
)
from openmythos.interop.mapping import (
    AnyRule,
    Family,
    Join,
    Rename,
    Rule,
    Split,
    export_config,
    export_shapes,
)
from openmythos.model.loop_signal import LoopLinear
from openmythos.model.recurrent import RecurrentDepthLM

# Fields of adapter_config.json that change what is computed, and the values that change nothing.
PLAIN: dict[str, Any] = {
    "bias": ("none",),
    **dict.fromkeys(
        ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"), (False, None)
    ),
    **dict.fromkeys(
        (
            *("modules_to_save", "alpha_pattern", "layer_replication", "trainable_token_indices"),
            *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
        ),
        (None, {}, []),
    ),
    # Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights before they train.
    "init_lora_weights": (None, False, True, "gaussian", "eva", "orthogonal", "mica"),
}


@dataclass(frozen=True)
class Change:
    """``scale * up down`` is added to a matrix. A first dimension is that of loops.

    ``start`` is the first of our matrix's rows, where that is known.
    """

    down: Float[Tensor, "*L R I"]
    up: Float[Tensor, "*L O R"]
    scale: float = 1.0
    start: int = 0

    @property
    def per_loop(self) -> bool:
        """Whether each loop has its own."""
        return self.up.ndim == 3

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.down.shape[-2]


# --- reading --------------------------------------------------------------------------------------


@torch.no_grad()
def merge_adapter(
    model: RecurrentDepthLM, folder: Path, base: object, families: Sequence[Family]
) -> RecurrentDepthLM:
    """A model with the adapter in a folder, ours or PEFT's; the model given is used up.

    Args:
        model: The base.
        folder: The adapter's, under the names of our export or of a family.
        base: The base's name, for messages.
        families: Those whose names are known.

    Raises:
        ValueError: It is of another base, of layers that the model does not have, or of a kind that
            cannot be added.
    """
    changes = _read(folder, base)
    if base_digest(folder) is not None:
        check_base(folder, weights_digest(model), base)
    loops = {name: change for name, change in changes.items() if change.per_loop}
    once = {name: change for name, change in changes.items() if not change.per_loop}
    _merge_once(model, once, folder, base, families)
    if not loops:
        return model.eval()
    by_matrix = _by_matrix(model.config, loops, folder, base)
    return _with_loops(model, by_matrix, merged_config(model.config, folder), folder)


def merged_config(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config of a model after an adapter is merged into it: LoRA per loop stays LoRA."""
    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != PER_LOOP:
        return config
    by_matrix = _by_matrix(config, _read(folder, folder), folder, folder)
    ranks = [sum(change.rank for change in each) for each in by_matrix.values()]
    counts = [len(change.up) for each in by_matrix.values() for change in each]
    own = None if config.loop_adapter is None else config.loop_adapter.core_lora
    lora = WeightLoRAConfig(
        rank=max(ranks, default=0) + (0 if own is None else own.rank),
        num_loops=max([*counts, 1 if own is None else own.num_loops]),
    )
    return replace(config, loop_adapter=lora)


def _read(folder: Path, base: object) -> dict[str, Change]:
    """An adapter's changes by the names of their layers, those that PEFT gives them."""
    settings = read_json(folder / ADAPTER_CONFIG)
    alpha, is_rooted = _alpha(settings, folder), bool(settings.get("use_rslora"))
    stored = open_adapter(folder)
    found, left = {}, set(stored.shapes)
    for name in stored.shapes:
        other = name.removesuffix(DOWN) + UP
        if not (name.startswith(PREFIX) and name.endswith(DOWN) and other in left):
            continue
        left -= {name, other}
        down, up = (stored.read(each).clone() for each in (name, other))
        allowed = (2, 3) if settings["peft_type"] == PER_LOOP else (2,)
        fits = down.ndim == up.ndim in allowed and down.shape[:-2] == up.shape[:-2]
        if not fits or not down.shape[-2] == up.shape[-1] > 0:
            raise ValueError(
                f"{folder / ADAPTER_FILE}: {name} is {list(down.shape)} and {other} "
                f"{list(up.shape)}: they are no two matrices of one rank"
            )
        rank = down.shape[-2]
        scale = alpha / (rank**0.5 if is_rooted else rank)
        found[name.removeprefix(PREFIX).removesuffix(DOWN)] = Change(down, up, scale)
    if left:
        raise ValueError(
            f"{folder} changes what {base} does not have, or what cannot be adapted: "
            f"{listed(sorted(left))}"
        )
    return found


def _alpha(settings: Mapping[str, Any], folder: Path) -> float:
    """What a change is multiplied by, times its rank.

    Raises:
        ValueError: The adapter is no plain LoRA.
    """
    where, kind = folder / ADAPTER_CONFIG, settings.get("peft_type")
    if kind not in ("LORA", PER_LOOP):
        raise ValueError(f"{where} has peft_type {kind!r}; only LORA is read")
    for name, plain in PLAIN.items():
        if name in settings and settings[name] not in plain:
            raise ValueError(f"{where} has {name} {settings[name]!r}; only plain LoRA is read")
    alpha = settings.get("lora_alpha", 8)
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not abs(alpha) <= sys.float_info.max:
        raise ValueError(f"{where} has lora_alpha {alpha!r}; it must be a number, and finite")
    return float(alpha)


def _merge_once(
    model: RecurrentDepthLM,
    changes: Mapping[str, Change],
    folder: Path,
    base: object,
    families: Sequence[Family],
) -> None:
    """Add the changes that all loops share, in at least fp32, one rule at a time."""
    rules = _rules(model.config, set(changes), families)
    shapes = export_shapes(rules, model)
    left, like = set(changes), model.embed.weight
    wide = torch.promote_types(like.dtype, torch.float32)
    for rule in rules:
        if not isinstance(rule, Rule):
            continue
        names = [name.removesuffix(".weight") for name in rule.theirs]
        if left.isdisjoint(names):
            continue
        left -= set(names)
        parts = []
        for name in names:
            shape = shapes[f"{name}.weight"]
            part = torch.zeros(shape, dtype=wide, device=like.device)
            if (change := changes.get(name)) is not None:
                _check_shape(change, shape, name, folder, base)
                part = change.up.to(part) @ change.down.to(part) * change.scale
            parts.append(part)
        for name, added in zip(rule.ours, rule.read(parts), strict=True):
            weight = model.get_parameter(name)
            weight.copy_(weight.to(wide) + added)
    _refuse_left(left, folder, base)


def _rules(config: ModelConfig, names: set[str], families: Sequence[Family]) -> Sequence[AnyRule]:
    """The rules of the export or, if it lacks a name, of a family that has all."""
    ours = export.rules(config)
    for family in (None, *families):
        try:
            if family is not None:
                export_config(family, config)
            rules = ours if family is None else family.rules(config)
        except ValueError:  # the family cannot express the model
            continue
        known = {name for rule in rules if isinstance(rule, Rule) for name in rule.theirs}
        if all(f"{name}.weight" in known for name in names):
            return rules
    return ours


def _by_matrix(
    config: ModelConfig, changes: Mapping[str, Change], folder: Path, base: object
) -> dict[str, list[Change]]:
    """Changes per loop by our matrices; others are left out."""
    known = {layer.name: layer for layer in layers(config) if layer.is_looped}
    found: dict[str, list[Change]] = {}
    loops = {name: change for name, change in changes.items() if change.per_loop}
    _refuse_left(loops.keys() - known.keys(), folder, base)
    for name, change in loops.items():
        layer = known[name]
        _check_shape(change, layer.shape, name, folder, base)
        found.setdefault(layer.matrix, []).append(replace(change, start=layer.start))
    return found


def _check_shape(
    change: Change, shape: tuple[int, ...], name: str, folder: Path, base: object
) -> None:
    if (change.up.shape[-2], change.down.shape[-1]) != shape:
        raise ValueError(
            f"{folder} changes {name} by {list(change.up.shape)} x {list(change.down.shape)}, and "
            f"it is {list(shape)} in {base}: the adapter is of another model"
        )


def _refuse_left(names: set[str], folder: Path, base: object) -> None:
    if names:
        raise ValueError(
            f"{folder} changes what {base} does not have, or what cannot be adapted: "
            f"{listed(sorted(names))}"
        )


def _with_loops(
    model: RecurrentDepthLM,
    changes: Mapping[str, Sequence[Change]],
    config: ModelConfig,
    folder: Path,
) -> RecurrentDepthLM:
    """The model with LoRA per loop: these changes, after its own where it has some already."""
    made, tensors = empty_model(config), dict(model.state_dict())
    for name, module in made.named_modules():
        if not isinstance(module, LoopLinear) or module.lora is None:
            continue
        own = [tensors.get(f"{name}.lora_{part}") for part in ("down", "up")]
        each = [] if own[0] is None else [Change(*own)]  # type: ignore[arg-type]
        like, loops = tensors[f"{name}.weight"], torch.arange(module.lora.num_loops)
        down = like.new_zeros(module.lora_down.shape)
        up, at = like.new_zeros(module.lora_up.shape), 0
        for change in (*each, *changes.get(f"{name}.weight", ())):
            row, stop = loops.clamp(max=len(change.up) - 1), change.start + change.up.shape[1]
            down[:, at : at + change.rank] = change.down[row].to(like)
            up[:, change.start : stop, at : at + change.rank] = (
                change.up[row].to(like) * change.scale
            )
            at += change.rank
        tensors |= {f"{name}.lora_down": down, f"{name}.lora_up": up}
    return fill_model(made, tensors.items(), folder, None, model.embed.weight.device)


# --- writing --------------------------------------------------------------------------------------


def write_adapter(folder: Path, config: ModelConfig, family: Family, out: PathLike) -> Path:
    """Write an adapter that was trained here alone, under a family's names, for PEFT.

    Args:
        folder: The adapter's.
        config: The base's.
        family: Whose names are written.
        out: The folder to write; an adapter in it is replaced.

    Raises:
        ValueError: The family cannot express the base, has no layer for a change, or changes differ
            by loop, which only this package's own format holds.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") == PER_LOOP:
        raise ValueError(
            f"{folder} has a change per loop, which PEFT cannot express: write the merged model"
        )
    export_config(family, config)
    alpha = _alpha(settings, folder)
    tensors, ranks = _renamed(_read(folder, folder), config, family)
    if not ranks:
        raise ValueError(f"{folder} changes nothing: it has not been trained yet")
    for name in ranks:  # PEFT multiplies by alpha / rank
        tensors[PREFIX + name + UP] *= ranks[name] / alpha
    common = max(set(ranks.values()), key=[*ranks.values()].count)
    settings |= {
        "r": common,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "use_rslora": False,
        "target_modules": [*ranks],
    }
    said = base_digest(folder)
    with replaced_folder(out, {ADAPTER_CONFIG, ADAPTER_FILE}) as fresh:
        write_json(fresh / ADAPTER_CONFIG, settings)
        save_tensors(tensors, fresh / ADAPTER_FILE, {} if said is None else {DIGEST: said})
    return Path(out)


def _renamed(
    changes: Mapping[str, Change], config: ModelConfig, family: Family
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors under a family's names, and the rank of each of its layers."""
    by_matrix: dict[str, list[Change]] = {}
    for layer in layers(config):
        if (change := changes.get(layer.name)) is not None:
            by_matrix.setdefault(layer.matrix, []).append(replace(change, start=layer.start))
    sizes = tensor_shapes(empty_model(config).state_dict())
    tensors: dict[str, Tensor] = {}
    ranks, left = {}, set(by_matrix)
    for rule in family.rules(config):
        if not isinstance(rule, Rename | Join | Split) or left.isdisjoint(rule.ours):
            continue
        left -= set(rule.ours)
        each = [(name, change) for name in rule.ours for change in by_matrix.get(name, ())]
        for their_name, down, up in _moved(rule, each, sizes):
            name = their_name.removesuffix(".weight")
            tensors[PREFIX + name + DOWN], tensors[PREFIX + name + UP] = down, up
            ranks[name] = len(down)
    if left:
        raise ValueError(f"{family.name} has no layer for the changes of {listed(sorted(left))}")
    return tensors, ranks


def _moved(
    rule: Rename | Join | Split,
    each: Sequence[tuple[str, Change]],
    sizes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Their names, down- and up-projections from changes of our matrices, side by side.

    A rule for rows moves up-projections, one for columns moves down-projections.
    """
    total, at = sum(change.rank for _, change in each), 0
    ups = {name: torch.zeros(sizes[name][0], total) for name in rule.ours}
    downs = {name: torch.zeros(total, sizes[name][1]) for name in rule.ours}
    for name, change in each:
        ranks = slice(at, at + change.rank)
        ups[name][change.start : change.start + len(change.up), ranks] = change.up * change.scale
        downs[name][ranks] = change.down
        at += change.rank
    if isinstance(rule, Join | Split) and rule.dim == 1 and getattr(rule, "groups", 1) == 1:
        up = torch.stack([*ups.values()]).sum(dim=0)
        for name, down in zip(rule.theirs, rule.write([*downs.values()]), strict=True):
            kept = down.any(dim=1)
            yield name, down[kept].contiguous(), up[:, kept].contiguous()
        return
    down = torch.stack([*downs.values()]).sum(dim=0)
    for name, up in zip(rule.theirs, rule.write([*ups.values()]), strict=True):
        kept = up.any(dim=0)
        yield name, down[kept].contiguous(), up[:, kept].contiguous()
