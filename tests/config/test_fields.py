import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

from openmythos.config.fields import REQUIRED, FieldDoc, fields_of, meanings
from openmythos.config.schema import apply_overrides, to_dict
from openmythos.train.recipe import RunConfig
from openmythos.train.run import resolve

BASE = resolve(None, None, None, [])
FIELDS = fields_of(RunConfig, used=BASE)


def test_every_field_has_a_meaning() -> None:
    missing = [(field.name, field.kind) for field in FIELDS if not field.meaning.endswith(".")]
    assert missing == []
    for field in FIELDS:
        assert all(field.choices.values()), field.name


def groups() -> dict[tuple[str, str | None], set[str]]:
    """The names listed below each part, by the part and the kind that has them."""
    found: dict[tuple[str, str | None], set[str]] = {}
    for field in FIELDS:
        part, _, name = field.name.rpartition(".")
        if part:
            found.setdefault((part, field.kind), set()).add(name)
    return found


def test_the_listed_names_are_those_that_set_accepts() -> None:
    """The answer to a wrong key names all that are allowed; it must be what is listed."""
    for (part, kind), names in groups().items():
        whole = next(field for field in FIELDS if field.name == part)
        chosen = [f"{part}.kind={kind}"] if kind in whole.choices else []
        with pytest.raises(ValueError, match="unknown key") as caught:
            apply_overrides(BASE, [*chosen, f"{part}.nope=1"])
        allowed = str(caught.value).rpartition("(allowed: ")[2].removesuffix(")")
        assert {*allowed.split(", ")} - {"kind"} == names, (part, kind)
    for field in FIELDS:
        if field.choices:
            with pytest.raises(ValueError, match="allowed: ") as caught:
                apply_overrides(BASE, [f"{field.name}=nope"])
            allowed = set(re.findall(r"\w+", str(caught.value).rpartition("allowed: ")[2]))
            assert allowed - {"or", "null"} == set(field.choices), field.name


def leaves(value: object, name: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {name}
    inside = [leaves(item, f"{name}.{key}" if name else key) for key, item in value.items()]
    return {name for part in inside for name in part if not name.endswith(".kind")}


def test_the_defaults_are_those_of_a_run() -> None:
    assert leaves(to_dict(BASE)) <= {field.name for field in FIELDS}
    by_name = {(field.name, field.kind): field for field in FIELDS}
    assert by_name["train.max_steps", None].default == BASE.train.max_steps == 1000
    assert by_name["model.injection", None].default == "lti"
    assert by_name["model.halting.threshold", "act"].default == 0.99
    assert by_name["model.attention.q_lora_rank", "mla"].default == REQUIRED
    assert by_name["train.eval_loops", None].default == [1, 2, 4, 8, 16]
    assert by_name["model.readout", None].type == "none | linear | final_norm"
    assert by_name["model.depth_attention", None].type == "fields | null"
    plain = {field.name: field for field in fields_of(RunConfig)}
    assert plain["model.num_loops"].default == REQUIRED


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        size: How large
            it is.
        other: More: of it.

    Source: nowhere.
    """

    kind: ClassVar[str] = "part"
    size: int
    other: str = "a"


@dataclass(frozen=True)
class Child(Part):
    """A child.

    Attributes:
        size: Larger.
    """


@dataclass(frozen=True)
class Whole:
    """A whole."""

    part: Part | None = None
    silent: bool = True


def test_meanings_are_read_from_docstrings() -> None:
    assert meanings(Part) == {"size": "How large it is.", "other": "More: of it."}
    assert meanings(Child) == {"size": "Larger.", "other": "More: of it."}
    assert fields_of(Whole) == [
        FieldDoc("part", None, "part | null", None, "", {"part": "A part."}),
        FieldDoc("part.size", None, "integer", REQUIRED, "How large it is."),
        FieldDoc("part.other", None, "text", "a", "More: of it."),
        FieldDoc("silent", None, "true | false", True, ""),
    ]
