import pytest

from openmythos.config import LTIInjectionConfig
from tests.strategies import unchecked


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (LTIInjectionConfig, {"decay_init": 1.0}, r"decay_init is 1.0; it must be in \(0, 1\)"),
    ],
)
def test_bad_fields_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)
