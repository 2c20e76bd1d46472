from typing import Any

import pytest

from tests.stress.killed_ranks import _differs

WHOLE: list[dict[str, Any]] = [
    {"kind": "train", "step": 1, "loss": 5.25, "rho": None},
    {"kind": "train", "step": 2, "loss": 0.5, "rho": 0.75},
]


@pytest.mark.parametrize(
    ("name", "value", "same", "close"),
    [
        ("loss", 5.25, True, True),
        ("loss", 5.25 * (1 + 1e-13), False, True),
        ("loss", 5.25 * (1 + 1e-11), False, False),
        ("loss", None, False, False),
        ("step", 3, False, False),
        ("rho", 0.5, False, False),
    ],
)
def test_what_counts_as_equal(name: str, value: object, same: bool, close: bool) -> None:
    found = [{**WHOLE[0], name: value}, WHOLE[1]]
    assert (_differs(WHOLE, found, exact=True) is None) == same
    assert (_differs(WHOLE, found, exact=False) is None) == close
    for fewer in (WHOLE[:1], []):
        assert _differs(WHOLE, fewer, exact=False) is not None
