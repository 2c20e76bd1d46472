"""Depth per request: efforts as numbers of loops, and exit rules."""

from collections.abc import Mapping
from typing import Any

from openmythos.model.exit import Rule, make_exit_rule
from openmythos.serve.error import APIError


def effort_table(num_loops: int, max_loops: int) -> dict[str, int]:
    """Loops per token by ``reasoning_effort``; medium is the depth that the model was trained at.

    Args:
        num_loops: The model's own number of loops.
        max_loops: The most that the server allows.
    """
    table = {
        "none": 1,
        "minimal": -(-num_loops // 4),
        "low": -(-num_loops // 2),
        "medium": num_loops,
        "high": -(-3 * num_loops // 2),
        "xhigh": 2 * num_loops,
        "max": max_loops,
    }
    return {effort: min(loops, max_loops) for effort, loops in table.items()}


def loops_of(
    num_loops: int | None,
    effort: str | None,
    efforts: Mapping[str, int],
    max_loops: int,
    default: int,
) -> int:
    """The loops per token that a request asks for, or the default.

    Raises:
        APIError: Both are given, the effort is unknown, or the number is out of range.
    """
    if num_loops is not None and effort is not None:
        raise APIError(400, "give num_loops or reasoning_effort, not both", param="num_loops")
    if effort is not None and effort not in efforts:
        allowed = ", ".join(efforts)
        said = f"reasoning_effort is {effort!r}; it must be one of {allowed}"
        raise APIError(400, said, param="reasoning_effort")
    loops = default if num_loops is None else num_loops
    loops = loops if effort is None else efforts[effort]
    if not 1 <= loops <= max_loops:
        said = f"num_loops is {loops}; it must be an integer in 1..{max_loops}"
        raise APIError(400, said, param="num_loops")
    return loops


def rule_of(given: Mapping[str, Any] | None, default: Rule | None) -> Rule | None:
    """The exit rule that a request describes as ``{"kind": ..., field: value}``.

    Raises:
        APIError: It describes none.
    """
    if given is None:
        return default
    fields = dict(given)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str):
        said = 'exit_rule must be an object with a kind, for example {"kind": "kl"}'
        raise APIError(400, said, param="exit_rule")
    try:
        return make_exit_rule(kind, **fields)
    except (ValueError, TypeError) as error:
        raise APIError(400, str(error), param="exit_rule") from None
