import pytest

from openmythos.engine.call_cost import HORIZON, CallCosts, Ends, ends_after

ROWS = (1, 2, 4, 8)


def linear(core: tuple[float, float], boundary: tuple[float, float]) -> CallCosts:
    """Costs of a fixed part and one per row."""
    core_costs = {rows: core[0] + core[1] * rows for rows in ROWS}
    return CallCosts(core_costs, {rows: boundary[0] + boundary[1] * rows for rows in ROWS})


def after(*loops: int) -> Ends:
    return ends_after(loops, 0, 99)


def worth_waiting(costs: CallCosts, num_held: int, looping: list[Ends]) -> bool:
    """If the tokens of all rows take as many loops on average."""
    return costs.loops_to_wait([4.0] * num_held, looping, [4.0] * len(looping)) > 0


def test_what_has_ended_by_when() -> None:
    assert after(2) == (0, 1, 1, 1, 1, 1, 1, 1)
    assert after(1, 3, 3, 20) == (0.25, 0.25, *[0.75] * 6)
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


def test_a_loop_of_waiting_against_a_crossing_saved() -> None:
    """Two of eight rows wait: a loop of the other six costs 1.75, and not six eighths of 2."""
    looping = [after(5)] * 5
    for saved, worth in ((0.76, True), (0.74, False)):
        costs = linear((1.0, 0.125), (saved, 0.5))
        loss = 1.75 - 6 * 2 / 8
        assert loss == 0.25
        assert worth_waiting(costs, 2, [after(1), *looping]) == (saved > loss)
        assert worth_waiting(costs, 2, [after(3), *looping]) == worth  # three such loops


def test_what_a_step_takes_besides_is_lost_with_every_row_that_waits() -> None:
    """Two of eight rows wait for a loop: a quarter of the step is lost on them too."""
    costs, looping = linear((1.0, 0.125), (0.5, 0.5)), [[4.0] * 2, [after(1), *[after(5)] * 5]]
    for step, worth in ((0.9, True), (1.1, False)):
        assert (costs.loops_to_wait(*looping, [4.0] * 6, step) > 0) == worth


def test_a_crossing_that_costs_by_the_row_is_not_waited_for() -> None:
    assert not worth_waiting(linear((1.0, 0.1), (0.0, 3.0)), 1, [after(1)] * 7)


def test_a_core_that_costs_by_the_row_loses_nothing() -> None:
    assert worth_waiting(linear((0.0, 1.0), (0.1, 1.0)), 1, [after(8)] * 7)
    assert not worth_waiting(linear((0.0, 1.0), (0.1, 1.0)), 1, [after(9)] * 7)  # not in sight


def test_shallow_rows_do_not_wait_for_deep_ones_but_for_each_other() -> None:
    costs = linear((1.0, 0.1), (1.0, 0.5))
    deep = [after(7)] * 4
    assert not worth_waiting(costs, 4, deep)
    assert worth_waiting(costs, 2, [after(1), after(1), *deep])


def test_rows_that_may_stop_at_any_time_are_waited_for_if_there_are_many() -> None:
    costs = linear((1.0, 0.1), (0.3, 0.5))
    assert worth_waiting(costs, 1, [after(1, 2, 5, 8)] * 7)
    assert not worth_waiting(costs, 7, [after(1, 2, 5, 8)])


def test_a_loop_is_worth_its_share_of_a_token() -> None:
    """Four rows at two loops wait for four at eight: loops are cheap, but theirs are tokens."""
    costs, deep = linear((0.0, 1.0), (1.0, 0.1)), [after(1)] * 4
    assert costs.loops_to_wait([8.0] * 4, deep, [8.0] * 4)
    assert not costs.loops_to_wait([2.0] * 4, deep, [8.0] * 4)
    assert costs.loops_to_wait([8.0] * 4, [after(1)] * 4, [2.0] * 4)
