"""Conversion between frozen dataclasses and JSON, with tagged unions and overrides. No torch.

A member of a union has a ``kind: ClassVar[str]``; its JSON object has the same value under
``"kind"``.
"""

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

ConfigT = TypeVar("ConfigT")
MAX_SHOWN = 200  # characters of a value in an error, which is one line
MAX_SEED = 2**64 - 1
WORDS: dict[type, str] = {  # kinds of values, for people who write JSON and options
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "text",
    bytes: "bytes",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def to_dict(config: object) -> dict[str, Any]:
    """The config as a JSON-able dict; union members are tagged with their ``kind``."""
    result: dict[str, Any] = {}
    if hasattr(config, "kind"):
        result["kind"] = config.kind
    for field in dataclasses.fields(cast(Any, config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in value]
        result[field.name] = value
    return result


def from_dict(cls: type[ConfigT], data: Mapping[str, Any], path: str = "") -> ConfigT:
    """Build ``cls`` from a JSON-able dict; ``path`` is the prefix of field names in errors.

    Raises:
        ValueError: An unknown or missing key, or a value of the wrong type; it names the field.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{_prefix(path)}expected an object, got {in_words(data)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls)) if field.init}
    kwargs: dict[str, Any] = {}
    for key, value in data.items():
        if key == "kind" and hasattr(cls, "kind"):
            continue
        where = f"{path}.{key}" if path else key
        if key not in fields:
            raise ValueError(f"unknown key {where!r}{_nearest(key, fields)}")
        kwargs[key] = _convert(hints[key], value, where)
    missing = [
        name
        for name, field in fields.items()
        if name not in kwargs
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{_prefix(path)}missing {', '.join(missing)}")
    return cls(**kwargs)


def apply_overrides(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """Apply overrides ``a.b=value``; a value that is not valid JSON is taken as a string.

    Setting ``x.kind`` chooses another member of a union and discards the old member's fields.

    Raises:
        ValueError: An override that is not ``key=value``, an unknown key, or a bad value.
    """
    data = to_dict(config)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} is not of the form key.subkey=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        _set(data, key.split("."), value)
    return from_dict(type(config), data)


def _set(data: dict[str, Any], keys: list[str], value: object) -> None:
    where = ".".join(keys)
    for depth, key in enumerate(keys[:-1]):
        if key not in data:
            raise ValueError(f"unknown key {'.'.join(keys[: depth + 1])!r}{_nearest(key, data)}")
        if data[key] is None:
            data[key] = {}
        elif isinstance(data[key], str):  # an earlier override chose a member by its kind
            data[key] = {"kind": data[key]}
        if not isinstance(data[key], dict):
            raise ValueError(f"{'.'.join(keys[: depth + 1])!r} has no fields; cannot set {where!r}")
        data = data[key]
    if keys[-1] == "kind" and data.get("kind") != value:
        data.clear()
    data[keys[-1]] = value


def _nearest(key: str, allowed: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, list(allowed), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(allowed)})"


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is typing.Literal:
        if value not in arguments:
            allowed = ", ".join(map(repr, arguments))
            raise ValueError(f"{path} is {shown(value)}; allowed: {allowed}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} is {shown(value)}; expected a list")
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if type(value) is hint:
            return value
        tag = getattr(hint, "kind", None)
        if tag is not None and isinstance(value, str):
            value = {"kind": value}
        if tag is not None and isinstance(value, Mapping) and value.get("kind", tag) != tag:
            raise ValueError(f"{path}.kind is {value['kind']!r}; allowed: {tag!r}")
        return from_dict(cast(Any, hint), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {shown(value)}; expected {WORDS[hint]}")
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    members = [member for member in arguments if member is not type(None)]
    if len(members) == 1:
        return _convert(members[0], value, path)
    tagged = {member.kind: member for member in members if hasattr(member, "kind")}
    if not tagged:
        for member in members:
            if isinstance(value, member):
                return value
        names = " or ".join(WORDS[member] for member in members)
        raise ValueError(f"{path} is {shown(value)}; expected {names}")
    if isinstance(value, str):  # `--set injection=add` reads better than injection.kind=add
        value = {"kind": value}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in tagged:
        optional = " or null" if type(None) in arguments else ""
        raise ValueError(f"{path}.kind is {shown(kind)}; allowed: {', '.join(tagged)}{optional}")
    return from_dict(tagged[kind], value, path)


def in_words(value: Any) -> str:
    """The kind of a JSON value, for example ``a list``."""
    return WORDS.get(type(value), "something else")


def _prefix(path: str) -> str:
    return f"{path}: " if path else ""


def shown(value: Any) -> str:
    """The beginning of a value, as it is written in JSON or an option."""
    plain_words = value is None or isinstance(value, bool | dict)
    text = json.dumps(value) if plain_words else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def json_ready(value: Any) -> Any:
    """A copy with None for NaN and infinities, which strict JSON does not have."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- checks of fields ---------------------------------------------------------------------------


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Unless ``condition`` holds, raise a ``ValueError`` with name, value and what is allowed.

    It is one line: of a tensor, which is printed in several, it shows the numbers.
    """
    if not condition:
        shown = " ".join(repr(plain(value)).split())
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        raise ValueError(f"{name} is {shown}; it must be {allowed}")


def require_positive(owner: object, *names: str) -> None:
    """Check that the named fields of a config are numbers of at least 1, and keep Python's.

    A field that is not declared as ``float`` holds an integer.
    """
    hints = typing.get_type_hints(type(owner))
    for name in names:
        value = plain(getattr(owner, name))
        whole = hints[name] is not float
        fits = type(value) is int or (type(value) is float and not whole)
        require(fits, name, value, f"{'an integer' if whole else 'a number'} of at least 1")
        require(value >= 1, name, value, "at least 1")
        require(value < 2**63, name, value, "below 2**63")
        object.__setattr__(owner, name, value)


def plain(value: Any) -> Any:
    """An array or tensor as Python numbers and lists; anything else is returned as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An integer of Python, numpy or torch as a Python ``int``.

    Raises:
        ValueError: The value is not an integer, is below ``least``, or is above ``most``.
    """
    number = plain(value)
    whole = isinstance(number, int) and not isinstance(number, bool)
    within = whole and (least is None or number >= least) and (most is None or number <= most)
    allowed = "an integer" if least is None else f"an integer of at least {least}"
    if least is not None and most is not None:
        allowed = f"an integer in {least}..{most}"
    require(within, name, number, allowed)
    fits = -(2**63) <= number < 2**64
    require(fits, name, number, f"{allowed} that fits into 64 bits")
    return int(number)


def as_seed(name: str, value: Any) -> int:
    """A seed as a Python ``int``; the range is the same everywhere.

    Raises:
        ValueError: The value is not an integer in 0..``MAX_SEED``.
    """
    return as_integer(name, value, 0, MAX_SEED)


def as_number(name: str, value: Any, allowed: str) -> float:
    """A finite number of Python, numpy or torch as a Python ``float``; the caller checks its range.

    Raises:
        ValueError: The value is not a number, or not a finite one.
    """
    number = plain(value)
    real = isinstance(number, int | float) and not isinstance(number, bool)
    require(real and abs(number) <= sys.float_info.max, name, number, allowed)
    return float(number)


def as_flag(name: str, value: Any) -> bool:
    """True or False of Python, numpy or torch as a Python ``bool``.

    Raises:
        ValueError: The value is anything else, for example the text "False".
    """
    flag = plain(value)
    require(isinstance(flag, bool), name, flag, "True or False")
    return bool(flag)


def require_literals(owner: object) -> None:
    """Check that every ``Literal`` field of ``owner`` has one of its allowed values."""
    for name, hint in typing.get_type_hints(type(owner)).items():
        if typing.get_origin(hint) is Literal:
            words = typing.get_args(hint)
            value = getattr(owner, name)
            require(value in words, name, value, "one of " + ", ".join(map(repr, words)))
