from typing import get_args

import pytest

from openmythos.config import (
    AddInjectionConfig,
    GateInjectionConfig,
    InjectionConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    NoInjectionConfig,
)
from openmythos.config.weights import Weights, matrix, vector
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


def test_what_is_applied_once_and_at_every_loop():
    assert LTIInjectionConfig().drive_weights(4) == matrix(4, 4)
    assert LTIInjectionConfig().weights(4) == vector(2 * 4)
    assert LinearInjectionConfig().drive_weights(4) == LinearInjectionConfig().weights(4)
    assert GateInjectionConfig().weights(4) == matrix(2 * 4, 4) + vector(4)
    for part in (AddInjectionConfig(), NoInjectionConfig()):
        assert part.drive_weights(4) == part.weights(4) == Weights()


def test_which_of_them_add_e():
    silent = [NoInjectionConfig(), GateInjectionConfig(add_e=False)]
    adding = [member() for member in get_args(InjectionConfig) if member is not NoInjectionConfig]
    assert not any(part.adds_e for part in silent)
    assert all(part.adds_e for part in adding)
