import json
import math

import pytest

from openmythos.demo.result import paired
from tests.demo.examples import demo_results, hops_result, loop_trace, text_result


def test_trained_depth_is_the_nearest_evaluated_by_ratio() -> None:
    assert text_result().trained_depth == 4
    assert text_result(mean_recurrence=5.5).trained_depth == 4
    assert text_result(mean_recurrence=6.0).trained_depth == 8


def test_hops_are_parted_at_the_longest_trained() -> None:
    result = hops_result()
    assert (result.trained_hops, result.unseen_hops) == ([1, 2, 4], [5, 8])
    assert result.at(5, 4).value == 0.6
    assert result.at(5, 4).stderr == pytest.approx((0.6 * 0.4 / 99) ** 0.5)
    loops, accuracy = result.best(5)
    assert (loops, accuracy.value) == (8, 0.8)
    assert paired(result.answers(5, 8), result.answers(5, 4)).value == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hops": [1]}, r"right is \(5, 5, 100\).* must be \(1, 5, 100\)"),
        ({"loops": [1, 2, 4, 8]}, r"right is \(5, 5, 100\).* must be \(5, 4, 100\)"),
        ({"loops": [1, 2, 4, 16, 8]}, "it must rise"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hops_result(**changes)


def test_text_needs_a_held_out_number() -> None:
    with pytest.raises(ValueError, match="held_out is empty"):
        text_result(held_out={})


def test_json_is_strict() -> None:
    diverged = loop_trace(state_norm=(1.0, math.inf, math.nan, 2.0))
    record = demo_results(text=text_result(trace=diverged)).to_dict()
    parsed = json.loads(json.dumps(record, allow_nan=False))
    assert parsed["text"]["trace"]["state_norm"] == [1.0, None, None, 2.0]
    assert parsed["text"]["validation"]["4"]["value"] == pytest.approx(2.0)
    assert parsed["hops"]["accuracy"][3][2] == 0.6
