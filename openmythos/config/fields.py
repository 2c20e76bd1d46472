"""The fields of a configuration: names as ``--set`` takes them, types, meanings. No torch.

The meanings are read from the ``Attributes`` of the dataclasses' docstrings.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

from openmythos.config.schema import to_dict

REQUIRED = "required"
_NOT_GIVEN = object()


@dataclass(frozen=True)
class FieldDoc:
    """One field of a configuration.

    Attributes:
        name: Its dotted name.
        kind: The member of its seam that has it; None if it is always there.
        type: What it may hold, in words.
        default: Its value where nothing is set, ready for JSON; "required" if it has none.
        meaning: What it is, in a sentence or two.
        choices: Of a seam: what each of its members is, by kind.
    """

    name: str
    kind: str | None
    type: str
    default: Any
    meaning: str
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)


def describe(
    name: str,
    hint: Any,
    meaning: str,
    default: Any = _NOT_GIVEN,
    *,
    used: Any = _NOT_GIVEN,
    kind: str | None = None,
) -> list[FieldDoc]:
    """A field and, if it holds dataclasses, all fields below it.

    Args:
        name: The field's dotted name.
        hint: Its type.
        meaning: What it is.
        default: The dataclass's default, if it has one.
        used: The value in a resolved configuration, if it is known; shown as the default.
        kind: The member that has the field.
    """
    parts = parts_of(hint)
    value = default if used is _NOT_GIVEN else used
    shown = REQUIRED if value is _NOT_GIVEN else _plain(value)
    choices = {part.kind: summary(part) for part in parts if hasattr(part, "kind")}
    if parts and not choices and shown is not None:
        shown = ""  # that of its fields, below
    rows = [FieldDoc(name, kind, type_in_words(hint), shown, meaning, choices)]
    for part in parts:
        given = getattr(part, "kind", None) if len(choices) > 1 else None
        inside = value if type(value) is part else _NOT_GIVEN
        rows += fields_of(part, name, used=inside, kind=given or kind)
    return rows


def fields_of(
    cls: type, name: str = "", *, used: Any = _NOT_GIVEN, kind: str | None = None
) -> list[FieldDoc]:
    """All fields of a dataclass, those of nested ones after the field that holds them."""
    said, hints = meanings(cls), typing.get_type_hints(cls)
    rows: list[FieldDoc] = []
    for field in dataclasses.fields(cls):
        default: Any = _NOT_GIVEN
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        rows += describe(
            f"{name}.{field.name}" if name else field.name,
            hints[field.name],
            said.get(field.name, ""),
            default,
            used=_NOT_GIVEN if used is _NOT_GIVEN else getattr(used, field.name),
            kind=kind,
        )
    return rows


def meanings(cls: type) -> dict[str, str]:
    """The ``Attributes`` of a class's docstring and of those that it inherits from, by name."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "")
        _, _, section = text.partition("\nAttributes:\n")
        section = re.split(r"\n(?=\S)", section)[0]
        for entry in re.split(r"\n(?= {4}\S)", section):
            attribute, colon, meaning = entry.strip().partition(": ")
            if colon:
                found[attribute] = " ".join(meaning.split())
    return found


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def parts_of(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a type allows."""
    allowed = typing.get_args(hint) if _is_union(hint) else (hint,)
    return tuple(part for part in allowed if inspect.isclass(part) and is_dataclass(part))


def type_in_words(hint: Any) -> str:
    """What a field of this type may hold."""
    arguments = typing.get_args(hint)
    if _is_union(hint):
        return " | ".join(type_in_words(part) for part in arguments)
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(hint) is tuple:
        return f"list of {type_in_words(arguments[0])}"
    if hint is type(None):
        return "null"
    if is_dataclass(hint):
        return str(getattr(hint, "kind", "fields"))
    return {bool: "true | false", float: "number", int: "integer", str: "text"}[hint]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _plain(value: Any) -> Any:
    """A default ready for JSON; of a member its kind, or its fields where it has no kind."""
    if is_dataclass(value) and not isinstance(value, type):
        return getattr(value, "kind", None) or to_dict(value)
    return list(value) if isinstance(value, tuple) else value
