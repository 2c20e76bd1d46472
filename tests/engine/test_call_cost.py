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
    """One of eight tokens ends after 1 loop, the others after 3; a loop takes a second.

    With a crossing of b, crossing after one loop makes 2 tokens' worth in 1 + b seconds, after two
    3.75 in 2 + b, after three, all together, 5.5 in 3 + b: 0.92 as much as after one at b = 0.005.
    """
    ends, loops = [after(1), *[after(3)] * 7], [4.0] * 8
    for fixed, wanted in ((0.0, (1, 1)), (0.1, (3, 8))):
        assert linear((1.0, 0.0), (fixed, 0.5)).loops_between(ends, loops) == wanted


def test_what_a_crossing_costs_by_the_row_is_not_saved_by_waiting() -> None:
    """Half of the rows end after 1 loop, half after 2: 3 / (2 + b), 2 / (1 + b); 0.92 at 0.586."""
    ends, loops = [*[after(1)] * 4, *[after(2)] * 4], [4.0] * 8
    for by_row in (0.0, 3.0):
        for fixed, wanted in ((0.0, (1, 4)), (0.5, (1, 4)), (0.7, (2, 8))):
            assert linear((1.0, 0.0), (fixed, by_row)).loops_between(ends, loops) == wanted


def test_steps_and_crossings_that_take_longer_than_their_calls() -> None:
    """As above, where b is 0.586 (1 + step)."""
    ends, loops = [*[after(1)] * 4, *[after(2)] * 4], [4.0] * 8
    costs = linear((1.0, 0.0), (0.65, 0.5))
    assert costs.loops_between(ends, loops) == (2, 8)
    assert costs.loops_between(ends, loops, 0.2) == (1, 4)
    assert costs.loops_between(ends, loops, 0.2, 1.2) == (2, 8)


def test_one_row_costs_a_whole_crossing() -> None:
    costs = CallCosts({1: 1.0}, {1: 5.0})
    assert costs.loops_between([after(3)], [3.0]) == (3, 1)


def test_what_is_not_in_sight_is_not_waited_for() -> None:
    costs = linear((1.0, 0.1), (50.0, 0.1))
    assert costs.loops_between([after(HORIZON), after(2)], [4.0] * 2) == (HORIZON, 2)
    assert costs.loops_between([after(HORIZON + 1)] * 2, [4.0] * 2) == (1, 1)
    assert costs.loops_between([], []) == (1, 1)


def test_shallow_rows_do_not_wait_for_deep_ones_but_for_each_other() -> None:
    """Two at a time: 2.5 / (1.8 + b) against 4 / (3.4 + b); all at once 6.4 / (9.8 + b)."""
    ends, loops = [*[after(1)] * 2, *[after(2)] * 2, *[after(8)] * 4], [2.0] * 4 + [8.0] * 4
    for fixed, wanted in ((0.8, (1, 2)), (1.0, (2, 4)), (20.0, (8, 8))):
        assert linear((1.0, 0.1), (fixed, 0.5)).loops_between(ends, loops) == wanted


def test_a_loop_is_worth_its_share_of_a_token() -> None:
    """Four rows end after two loops, four after eight: the first are tokens of 2 or of 8 loops.

    2 / (3.6 + b) against 5 / (12 + b), or 5 / (3.6 + b) against 8 / (12 + b).
    """
    costs, ends = linear((1.0, 0.1), (4.0, 0.5)), [after(2)] * 4 + [after(8)] * 4
    assert costs.loops_between(ends, [8.0] * 8) == (8, 8)
    assert costs.loops_between(ends, [2.0] * 4 + [8.0] * 4) == (2, 4)
