"""The property tests draw every field of the model's config and every member of every seam."""

import dataclasses

import pytest
from hypothesis import find

from openmythos.config import ModelConfig
from openmythos.config.schema import from_dict
from tests.strategies import EXAMPLES, SEAMS, examples, model_fields, one_of, small_config

MEMBERS = [
    pytest.param(seam, part, id=f"{seam}-{getattr(part, 'kind', 'one')}")
    for seam, parts in SEAMS.items()
    for part in parts
]


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING is field.default_factory


@pytest.mark.parametrize(("seam", "part"), MEMBERS)
def test_every_member_is_drawn(seam: str, part: type) -> None:
    needed = {field.name for field in dataclasses.fields(part) if is_required(field)}
    missing = needed - EXAMPLES.get(part, {}).keys()
    assert not missing, f"tests/strategies.py has no examples of {part.__name__}: {missing}"
    for example in examples(part):
        assert type(from_dict(part, example)) is part
    if hasattr(part, "kind"):
        assert find(one_of(SEAMS[seam]), lambda drawn: drawn["kind"] == part.kind)


def test_every_field_of_the_model_is_drawn() -> None:
    drawn = find(model_fields(), lambda fields: True)
    assert drawn.keys() == {field.name for field in dataclasses.fields(ModelConfig)}


def test_the_seams_are_those_of_the_config() -> None:
    assert len(SEAMS["injection"]) >= 6 and len(SEAMS["core_feed_forward"]) >= 3
    parts = {
        name for name, value in vars(small_config()).items() if dataclasses.is_dataclass(value)
    }
    assert parts < SEAMS.keys()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unlisted:
    kind = "unlisted"
    rank: int


def test_a_member_without_examples_is_named() -> None:
    with pytest.raises(AssertionError, match=r"no examples of Unlisted: \{'rank'\}"):
        test_every_member_is_drawn("loop_adapter", Unlisted)
