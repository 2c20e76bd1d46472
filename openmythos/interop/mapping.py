"""Map another family's checkpoints onto ours: declared once, run in both directions.

A ``Family`` has its config fields and a list of rules. A rule names the family's tensors on one
side ("theirs") and our tensors on the other, and only moves numbers (except for ``Shift``), so that
a round trip gives the same bytes. The names and shapes that are expected in the family's files
follow from the rules and our model.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmythos.checkpoint.weights import StoredWeights, check_shapes, tensor_shapes
from openmythos.config import ModelConfig
from openmythos.config.schema import WORDS, to_dict
from openmythos.model.recurrent import RecurrentDepthLM

# --- rules ----------------------------------------------------------------------------------------
# ``read`` makes our tensors, which share no memory with the files, from theirs in the order of the
# names. It takes theirs one at a time, because all of them together are as large as the result.
# ``write`` is its inverse.


@dataclass(frozen=True)
class Rename:
    """One tensor under two names; ``transpose`` swaps its two dimensions."""

    their_name: str
    our_name: str
    transpose: bool = False

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their_name,)

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.our_name,)

    def read(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return self._turned(tensor)

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._turned(tensors[0])

    def _turned(self, tensor: Tensor) -> list[Tensor]:
        turned = tensor.T if self.transpose else tensor
        return [turned.clone(memory_format=torch.contiguous_format)]


@dataclass(frozen=True)
class Reshape:
    """One tensor under two names and shapes, with the same numbers in the same order."""

    their_name: str
    our_name: str
    their_shape: tuple[int, ...]
    our_shape: tuple[int, ...]

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their_name,)

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.our_name,)

    def read(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor.reshape(self.our_shape).clone()]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].reshape(self.their_shape).clone()]


@dataclass(frozen=True)
class Shift:
    """Ours is theirs plus 1: the weight of a norm that multiplies by 1 + weight."""

    their_name: str
    our_name: str

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their_name,)

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.our_name,)

    def read(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor + 1]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0] - 1]


@dataclass(frozen=True)
class Constant:
    """One of our tensors for which they have none, because all its numbers are always ``value``.

    Reading: it is made. Writing: it must still have this value everywhere.
    """

    our_name: str
    our_shape: tuple[int, ...]
    value: float

    @property
    def theirs(self) -> tuple[str, ...]:
        return ()

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.our_name,)

    def read(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [torch.full(self.our_shape, self.value)]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        if not tensor.is_meta and bool((tensor != self.value).any()):
            changed = f"{self.our_name} is not {self.value:g} everywhere any more"
            raise ValueError(f"{changed}, and the family has no tensor for it")
        return []


@dataclass(frozen=True)
class Join:
    """Several of their tensors, concatenated along ``dim``, are one of ours.

    Args:
        theirs: Their names, in order.
        our_name: Our name.
        sizes: Length of each part along ``dim``, within one group; None: all are equal.
        dim: The dimension along which they are concatenated.
        groups: With more than one group, such as heads, parts are interleaved along dimension 0:
            part 1 of group 1, part 2 of group 1, part 1 of group 2 ...
        stack: Size of a leading dimension, such as experts, that ours has and that is split off
            dimension 0; None: no such dimension.
    """

    theirs: tuple[str, ...]
    our_name: str
    sizes: tuple[int, ...] | None = None
    dim: int = 0
    groups: int = 1
    stack: int | None = None

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.our_name,)

    def read(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        joined, start = None, 0
        for number, part in enumerate(tensors):
            dim = self.dim if self.groups == 1 else 1
            part = part if self.groups == 1 else part.unflatten(0, (self.groups, -1))
            if joined is None:
                shape = list(part.shape)
                shape[dim] = sum(self.sizes or (shape[dim],) * len(self.theirs))
                joined = part.new_empty(shape)
            if part.dtype != joined.dtype:
                joined = joined.to(torch.promote_types(part.dtype, joined.dtype))
            length = part.shape[dim] if self.sizes is None else self.sizes[number]
            joined.narrow(dim, start, length).copy_(part)
            start += length
        assert joined is not None
        joined = joined if self.groups == 1 else joined.flatten(0, 1)
        return [joined if self.stack is None else joined.unflatten(0, (self.stack, -1))]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        joined, dim = tensors[0], self.dim
        if self.stack is not None:
            joined = joined.flatten(0, 1)
        if self.groups > 1:
            joined, dim = joined.unflatten(0, (self.groups, -1)), 1
        sizes = self.sizes or (joined.shape[dim] // len(self.theirs),) * len(self.theirs)
        parts = joined.split(sizes, dim=dim)
        if self.groups > 1:
            parts = tuple(part.flatten(0, 1) for part in parts)
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]


@dataclass(frozen=True)
class Split:
    """One of their tensors is the concatenation of several of ours along ``dim``."""

    their_name: str
    ours: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    dim: int = 0

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their_name,)

    def read(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return Join(self.ours, self.their_name, self.sizes, self.dim).write(list(tensors))

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return Join(self.ours, self.their_name, self.sizes, self.dim).read(tensors)


@dataclass(frozen=True)
class TiedCopy:
    """Their second copy of tensor ``of``, which we store once.

    Reading: it may be absent, and must be equal otherwise. Writing: the copy is written.
    """

    their_name: str
    of: str


@dataclass(frozen=True)
class Recomputed:
    """A buffer that both sides compute from the config.

    Reading: it may be absent, and is ignored. Writing: it is left out.
    """

    their_name: str


@dataclass(frozen=True)
class Dead:
    """A parameter of their model that no output depends on.

    Reading: it must have this shape, and is ignored. Writing: it is filled with zeros, so that the
    exported checkpoint is complete.
    """

    their_name: str
    their_shape: tuple[int, ...]


Rule = Rename | Reshape | Shift | Constant | Join | Split
AnyRule = Rule | TiedCopy | Recomputed | Dead


# --- families -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published family.

    ``recognises`` gets config.json and the names of the weights. ``read_config`` raises
    ``ValueError`` for what our config cannot express. ``write_config`` need not check what theirs
    cannot, because ``export_config`` reads its result back and compares. ``prefixes`` are prefixes
    of all names in a file that the family's programs may have left there.
    """

    name: str
    recognises: Callable[[Mapping[str, Any], Collection[str]], bool]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Sequence[AnyRule]]
    prefixes: tuple[str, ...] = ()


def check_fields(
    data: Mapping[str, Any],
    *,
    types: Mapping[str, type],
    fixed: Mapping[str, Any] | None = None,
    skipped: Collection[str] = (),
) -> dict[str, Any]:
    """Check all fields of a family's config.json and return those in ``types``.

    Args:
        data: The content of config.json.
        types: Required fields and their types; an integer is accepted for a float.
        fixed: Optional fields of which only this value is supported.
        skipped: Fields to ignore, which do not change what the model computes.

    Raises:
        ValueError: Fields are missing, unknown or wrong; lists them.
    """
    fixed = {} if fixed is None else fixed
    complaints = [f"missing {name}" for name in types if name not in data]
    known = {*types, *fixed, *skipped}
    complaints += [f"unknown {name}" for name in data if name not in known]
    values = {}
    for name in types.keys() & data.keys():
        value, kind = data[name], types[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            complaints.append(f"{name} is {value!r}, expected {WORDS[kind]}")
        values[name] = value
    for name, allowed in fixed.items():
        if data.get(name, allowed) != allowed:
            complaints.append(f"{name} is {data[name]!r}; only {allowed!r} is supported")
    if complaints:
        raise ValueError(f"config.json: {'; '.join(complaints)}")
    return values


def read_tensors(
    family: Family,
    model: RecurrentDepthLM,
    weights: StoredWeights,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, made one rule at a time from a family's files; parameters in ``dtype``.

    Raises:
        ValueError: Names or shapes do not fit (raised before any tensor is read), or a tied copy
            differs.
    """
    rules = family.rules(model.config)
    expected = export_shapes(rules, model)
    optional = {rule.their_name for rule in rules if isinstance(rule, TiedCopy | Recomputed)}
    present = {name: shape for name, shape in expected.items() if name in weights.shapes}
    needed = {name: shape for name, shape in expected.items() if name not in optional}
    recomputed = {rule.their_name for rule in rules if isinstance(rule, Recomputed)}
    given = {name: shape for name, shape in weights.shapes.items() if name not in recomputed}
    check_shapes(given, needed | present, weights.folder)
    return _read(rules, weights, dtype, {name for name, _ in model.named_parameters()})


def _read(
    rules: Sequence[AnyRule], weights: StoredWeights, dtype: torch.dtype | None, cast: set[str]
) -> Iterator[tuple[str, Tensor]]:
    for rule in rules:
        if isinstance(rule, TiedCopy) and rule.their_name in weights.shapes:
            _check_tied(rule, weights)  # first, while memory is empty
    moves = [rule for rule in rules if not isinstance(rule, TiedCopy | Recomputed | Dead)]
    stored = dtype
    for rule in sorted(moves, key=lambda rule: weights.size(rule.theirs), reverse=True):
        wanted = dtype if cast.issuperset(rule.ours) else None
        parts = (weights.read(name).to(dtype=wanted) for name in rule.theirs)
        made = rule.read(parts)
        if isinstance(rule, Constant) and cast.issuperset(rule.ours):
            made = [tensor.to(stored) for tensor in made]  # like the parameters that were read
        stored = made[0].dtype if stored is None else stored
        yield from zip(rule.ours, made, strict=True)


def _check_tied(rule: TiedCopy, weights: StoredWeights) -> None:
    if not torch.equal(weights.read(rule.their_name), weights.read(rule.of)):
        raise ValueError(
            f"{weights.folder}: {rule.their_name} differs from {rule.of}, but the config ties them"
        )


def export_tensors(family: Family, model: RecurrentDepthLM) -> dict[str, Tensor]:
    """The model's weights under the family's names, without ``Recomputed`` buffers."""
    return _written(family.rules(model.config), model.state_dict())


def export_shapes(rules: Sequence[AnyRule], model: RecurrentDepthLM) -> dict[str, tuple[int, ...]]:
    """The shapes of a family's tensors."""
    meta = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return tensor_shapes(_written(rules, meta))


@torch.no_grad()
def _written(rules: Sequence[AnyRule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours, each of which must be used once; meta tensors give the shapes."""
    theirs: dict[str, Tensor] = {}
    used: list[str] = []
    for rule in rules:
        if isinstance(rule, TiedCopy):
            theirs[rule.their_name] = theirs[rule.of].clone()
        elif isinstance(rule, Dead):
            like = next(iter(ours.values()))
            theirs[rule.their_name] = like.new_zeros(rule.their_shape)
        elif not isinstance(rule, Recomputed):
            used += rule.ours
            parts = rule.write([ours[name] for name in rule.ours])
            theirs |= zip(rule.theirs, parts, strict=True)
    if sorted(used) != sorted(ours):
        wrong = sorted(set(used) ^ set(ours))
        raise ValueError(f"the family's rules do not use each of our tensors once: {wrong}")
    return theirs


def export_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The family's config.json for a model.

    Raises:
        ValueError: The family cannot express the model; lists the fields that differ.
    """
    written = family.write_config(config)
    try:
        read = family.read_config(written)
    except ValueError as error:
        raise ValueError(f"{family.name} cannot express this model: {error}") from None
    ours, back = _flat(to_dict(config)), _flat(to_dict(read))
    changed = [
        f"{name} is {ours.get(name)!r}, there {back.get(name)!r}"
        for name in sorted(ours.keys() | back.keys())
        if ours.get(name) != back.get(name) and not name.endswith("_init")  # initialisation only
    ]
    if changed:
        raise ValueError(f"{family.name} cannot express this model: {'; '.join(changed)}")
    return written


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
