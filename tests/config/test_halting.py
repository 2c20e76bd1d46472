from typing import get_args

import pytest

from openmythos.config import ACTConfig, HaltingConfig, UniversalACTConfig
from openmythos.config.weights import matrix, vector
from tests.strategies import unchecked


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ACTConfig, {"threshold": 0.0}, r"halting.threshold is 0.0; it must be in \(0, 1\]"),
        (
            UniversalACTConfig,
            {"threshold": 2.0},
            r"halting.threshold is 2.0; it must be in \(0, 1\]",
        ),
        (
            UniversalACTConfig,
            {"readout": "sum"},
            "readout is 'sum'; it must be one of 'basic', 'accumulated'",
        ),
    ],
)
def test_bad_fields_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_a_head_is_one_logit():
    assert all(part().weights(16) == matrix(16, 1) + vector(1) for part in get_args(HaltingConfig))
