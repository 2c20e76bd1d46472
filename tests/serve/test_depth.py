"""Efforts and exit rules of requests."""

from typing import Any

import pytest

from openmythos.model.exit import KLExit
from openmythos.serve.depth import effort_table, loops_of, rule_of
from openmythos.serve.error import APIError


def test_medium_is_the_trained_depth_and_nothing_passes_the_limit() -> None:
    assert list(effort_table(8, 32).values()) == [1, 2, 4, 8, 12, 16, 32]
    assert list(effort_table(1, 2).values()) == [1, 1, 1, 1, 2, 2, 2]
    assert list(effort_table(5, 6).values()) == [1, 2, 3, 5, 6, 6, 6]


@pytest.mark.parametrize(
    ("num_loops", "effort", "expected"),
    [(None, None, 5), (3, None, 3), (None, "low", 4), (None, "max", 16)],
)
def test_a_number_a_word_or_the_default(
    num_loops: int | None, effort: str | None, expected: int
) -> None:
    assert loops_of(num_loops, effort, effort_table(8, 16), 16, 5) == expected


@pytest.mark.parametrize(
    ("num_loops", "effort", "param"),
    [(3, "low", "num_loops"), (0, None, "num_loops"), (17, None, "num_loops")]
    + [(None, word, "reasoning_effort") for word in ("", "LOW", "ultra")],
)
def test_other_depths_are_refused(num_loops: int | None, effort: str | None, param: str) -> None:
    with pytest.raises(APIError) as caught:
        loops_of(num_loops, effort, effort_table(8, 16), 16, 8)
    assert caught.value.status == 400 and caught.value.param == param


def test_rules_by_kind_and_fields() -> None:
    assert rule_of({"kind": "kl", "threshold": 0.5}, None) == KLExit(threshold=0.5)
    assert rule_of(None, KLExit()) == KLExit() and rule_of(None, None) is None


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"kind": 3},
        {"kind": "hope"},
        {"kind": "kl", "threshold": "x"},
        {"kind": "kl", "kinds": 1},
        {"kind": "kl", "threshold": -1},
    ],
)
def test_other_rules_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(APIError) as caught:
        rule_of(given, None)
    assert caught.value.status == 400 and caught.value.param == "exit_rule"
