import pytest

from openmythos.config import RopeConfig
from tests.strategies import unchecked


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (RopeConfig, {"theta": 1.0}, "rope.theta is 1.0; it must be above 1"),
    ],
)
def test_bad_fields_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)
