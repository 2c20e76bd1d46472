import pytest

from openmythos.engine.call_cost import HORIZON, CallCosts, Ends, ends_after

ROWS = (1, 2, 4, 8)


def linear(core: tuple[float, float], boundary: tuple[float, float]) -> CallCosts:
    """Costs of a fixed part and one per row."""
    core_costs = {rows: core[0] + core[1] * rows for rows in ROWS}
    return CallCosts(core_costs, {rows: boundary[0] + boundary[1] * rows for rows in ROWS})


def after(*loops: int) -> Ends:
    return ends_after(loops, 0, 99)


def test_what_has_ended_by_when() -> None:
    assert after(2) == (0, *[1] * (HORIZON - 1))
    assert after(1, 3, 3, 20) == (0.25, 0.25, *[0.75] * (HORIZON - 2))
    assert len(after(99)) == HORIZON and sum(after(99)) == 0
    assert ends_after((1, 3, 5, 5), 3, 8)[:3] == (0, 1, 1)
    assert ends_after((1, 3), 3, 7)[:5] == ends_after((), 3, 7)[:5] == (0.25, 0.5, 0.75, 1, 1)


@pytest.mark.parametrize(
    ("padded", "wanted"),
    [(False, [1.0, 1.0, 2.0, 3.0, 4.0]), (True, [1.0, 1.0, 3.0, 3.0, 4.0])],
)
def test_costs_between_measured_rows(padded: bool, wanted: list[float]) -> None:
    core = {2: 1.0, 4: 3.0, 8: 4.0}
    costs = CallCosts(core, {}, core if padded else None, {})
    assert [costs.loop(rows) for rows in (1, 2, 3, 4, 8)] == wanted


def test_rows_of_nobody_cost_less() -> None:
    costs = CallCosts({1: 2.0, 4: 6.0}, {}, {1: 1.0, 4: 2.0}, {})
    assert [costs.loop(rows) for rows in (1, 2, 3, 4)] == [2.0, 4.0, 5.0, 6.0]


def test_a_crossing_waits_until_most_loops_get_done_per_second() -> None:
    """One of eight tokens ends after 1 loop, the others after 3; loops take 2, 1.875 and 1.875.

    With a crossing of b + 0.5 per row, crossing at once makes 2 tokens' worth in 2.5 + b seconds,
    crossing together 5.5 in 9.75 + b: as much where b is 5.75 / 3.5 = 1.643.
    """
    ends, loops = [after(1), *[after(3)] * 7], [4.0] * 8
    for fixed, wanted in ((1.6, 1), (1.7, 8)):
        assert linear((1.0, 0.125), (fixed, 0.5)).rows_to_await(ends, loops) == wanted
    # What a crossing and a step take besides: 3.5 b = 5.75 + 0.5 step.
    assert linear((1.0, 0.125), (1.6, 0.5)).rows_to_await(ends, loops, cross=0.1) == 8
    for step, wanted in ((0.3, 8), (0.5, 1)):
        assert linear((1.0, 0.125), (1.7, 0.5)).rows_to_await(ends, loops, step) == wanted


def test_a_crossing_that_costs_by_the_row_is_not_waited_for() -> None:
    costs = linear((1.0, 0.1), (0.0, 3.0))
    assert costs.rows_to_await([after(1), *[after(2)] * 7], [4.0] * 8) == 1


def test_what_is_not_in_sight_is_not_waited_for() -> None:
    costs = linear((1.0, 0.1), (50.0, 0.1))
    assert costs.rows_to_await([after(HORIZON), after(2)], [4.0] * 2) == 2
    assert costs.rows_to_await([after(HORIZON + 1), after(2)], [4.0] * 2) == 1
    assert costs.rows_to_await([after(HORIZON + 1)] * 2, [4.0] * 2) == 1
    assert costs.rows_to_await([], []) == 1


def test_shallow_rows_do_not_wait_for_deep_ones_but_for_each_other() -> None:
    """Two at a time: 2.5 / 3.8 against 4 / 6.4; with 1 more per crossing 2.5 / 4.8, 4 / 7.4."""
    ends, loops = [*[after(1)] * 2, *[after(2)] * 2, *[after(8)] * 4], [2.0] * 4 + [8.0] * 4
    for fixed, wanted in ((1.0, 2), (2.0, 4)):
        assert linear((1.0, 0.1), (fixed, 0.5)).rows_to_await(ends, loops) == wanted


def test_rows_that_may_stop_at_any_time_are_waited_for_by_their_mean() -> None:
    """Of eight, two have ended after 1 loop, four after 2, six after 5, all after 8.

    Loops get done 2, 3.5, 6.5 and 8 tokens' worth in 1.8, 3.4, 7.6 and 11.2 seconds.
    """
    ends, loops = [after(1, 2, 5, 8)] * 8, [4.0] * 8
    assert linear((1.0, 0.1), (0.3, 0.5)).rows_to_await(ends, loops) == 2
    assert linear((1.0, 0.1), (9.0, 0.5)).rows_to_await(ends, loops) == 6  # 6.5 / 19.6, 8 / 24.2
    assert linear((1.0, 0.1), (20.0, 0.5)).rows_to_await(ends, loops) == 8  # 6.5 / 30.6, 8 / 35.2


def test_a_loop_is_worth_its_share_of_a_token() -> None:
    """Four rows end after two loops, four after eight: the first are tokens of 2 or of 8 loops."""
    costs, ends = linear((1.0, 0.1), (3.0, 0.5)), [after(2)] * 4 + [after(8)] * 4
    assert costs.rows_to_await(ends, [8.0] * 8) == 8
    assert costs.rows_to_await(ends, [2.0] * 4 + [8.0] * 4) == 4
