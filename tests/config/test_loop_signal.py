import pytest

from openmythos.config import LearnedLoopConfig, OutputLoRAConfig, WeightLoRAConfig
from tests.strategies import unchecked


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (LearnedLoopConfig, {"num_loops": 0}, "num_loops is 0; it must be at least 1"),
        (WeightLoRAConfig, {"rank": 0, "num_loops": 1}, "rank is 0; it must be at least 1"),
        (OutputLoRAConfig, {"rank": 1, "num_loops": 0}, "num_loops is 0; it must be at least 1"),
    ],
)
def test_bad_fields_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)
