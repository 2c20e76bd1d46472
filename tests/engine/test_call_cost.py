import pytest

from openmythos.engine.call_cost import CallCosts

ROWS = (1, 2, 4, 8)


def test_costs_between_measured_rows_are_on_a_line() -> None:
    costs = CallCosts(core={2: 1.0, 4: 3.0, 8: 4.0}, boundary={2: 0.0, 4: 0.0, 8: 0.0})
    # With one loop per token, a row stops after 1/n calls of n rows.
    seconds = [costs.seconds(1, rows, 1.0) * rows for rows in (1, 2, 3, 4, 6, 8, 9)]
    assert seconds == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 4.0])


def test_tokens_that_wait_for_all_run_in_ever_smaller_calls() -> None:
    costs = CallCosts(core={1: 1.0, 3: 3.0}, boundary={1: 6.0, 3: 6.0})
    assert costs.seconds(3, 3, 4.0) == pytest.approx((3 * 4 / 3 + 2 * 4 / 2 + 1 * 4 + 6) / 3)


@pytest.mark.parametrize(("boundary", "hold"), [(0.0, 1), (1e-9, 1), (100.0, 8)])
def test_a_dear_boundary_is_waited_for_and_a_cheap_one_not(boundary: float, hold: int) -> None:
    """The core costs the same for any number of rows, the boundary too."""
    costs = CallCosts(core=dict.fromkeys(ROWS, 1.0), boundary=dict.fromkeys(ROWS, boundary))
    assert costs.hold(8, 4.0) == hold


def test_a_boundary_that_costs_by_the_row_is_not_waited_for() -> None:
    costs = CallCosts(core=dict.fromkeys(ROWS, 1.0), boundary={rows: 2.0 * rows for rows in ROWS})
    assert costs.hold(8, 4.0) == 1


def test_between_the_two_some_rows_are_waited_for() -> None:
    costs = CallCosts(
        core={rows: 1.0 + 0.2 * rows for rows in ROWS},
        boundary={rows: 2.0 + 0.2 * rows for rows in ROWS},
    )
    holds = [costs.hold(8, loops) for loops in (1.0, 4.0, 40.0)]
    assert holds == sorted(holds, reverse=True)
    assert 1 <= holds[2] < holds[0] <= 8 and costs.hold(1, 4.0) == 1
