import pytest

from openmythos.demo.takeaway import (
    Takeaway,
    halting_takeaways,
    hops_takeaways,
    takeaways,
    text_takeaways,
    trace_takeaway,
)
from openmythos.report.page import Piece, Sample
from tests.demo.examples import (
    ACCURACY,
    demo_results,
    documents,
    halted_result,
    hops_result,
    loop_trace,
    text_result,
)


def find(found: list[Takeaway], words: str) -> Takeaway:
    (one,) = [item for item in found if words in item.text]
    return one


def test_looping_that_helps_and_does_not() -> None:
    good = text_takeaways(text_result())[0]
    assert good.holds
    assert "4 loops read held-out text at 2.000 ± 0.048 bits per byte, 1 loop at 2.500" in good.text
    assert "saves 0.5000 ± 0.0000 bits (20.00 ± 0.00 %)" in good.text
    bad = text_takeaways(text_result(validation={1: 2.0, 4: 2.1}))[0]
    assert bad.holds is False
    assert "does not help here, it costs 0.100" in bad.text


def test_a_gain_is_believed_by_the_error_of_its_differences() -> None:
    """The levels' errors, 0.05, say nothing: documents differ more than depths do."""
    error = 0.01 / 39**0.5  # of the mean of +-0.01 over 40 documents
    for gain, clear in ((1.5 * error, False), (2.5 * error, True)):
        held_out = {1: documents(2.0, jitter=0.01), 4: documents(2.0 - gain)}
        found = text_takeaways(text_result(held_out=held_out))[0]
        assert found.holds is clear
        assert f"saves {gain:.4f} ± {error:.4f} bits ({50 * gain:.2f} ± {50 * error:.2f} %)" in (
            found.text
        )
        assert ("no clear difference" in found.text) is not clear


@pytest.mark.parametrize(
    ("deep", "holds", "words"),
    [
        (1.98, True, "1.00 ± 0.00 % better than at 4: running deeper than trained does not hurt"),
        (2.0, True, "0.00 ± 0.00 % worse than at 4: no clear difference"),
        (2.01, True, "0.50 ± 0.00 % worse than at 4: running deeper than trained does little harm"),
        (2.2, False, "10.00 ± 0.00 % worse than at 4: this model should not"),
    ],
)
def test_running_deeper_than_trained(deep: float, holds: bool, words: str) -> None:
    found = find(text_takeaways(text_result(validation={4: 2.0, 16: deep})), "times the trained")
    assert found.holds is holds
    assert "At 16 loops, 4 times the trained mean depth" in found.text
    assert words in found.text


def test_marks_choose_their_side() -> None:
    found = find(text_takeaways(text_result(marks={"xz -9": 1.81, "gzip": 2.6})), "Its best")
    assert "On the same held-out text xz -9 needs 1.810 (0.170 less)" in found.text
    assert "gzip needs 2.600 (0.620 more)" in found.text


def test_exit_rule_on_text_is_described_by_what_it_did() -> None:
    assert "spent 1 to 16 loops" in find(text_takeaways(text_result()), "spent").text
    same = text_result(samples=[Sample("a", [Piece("b", 4), Piece("c", 4)])])
    assert find(text_takeaways(same), "did not tell them apart").holds is False
    assert not any("spent" in item.text for item in text_takeaways(text_result(samples=[])))


def test_never_trained_hops_have_three_endings() -> None:
    good = find(hops_takeaways(hops_result()), "never trained")
    assert good.holds
    assert "never trained: 0.800 ± 0.040 at 8 loops against 0.070 ± 0.026 at 2" in good.text
    assert "+0.730 ± 0.045" in good.text
    rows = [list(row) for row in ACCURACY]
    rows[3] = [0.06, 0.1, 0.2, 0.3, 0.3]
    lost = find(hops_takeaways(hops_result(accuracy=rows)), "never trained")
    assert lost.holds is False
    assert "did not carry over" in lost.text
    rows[3] = [0.8, 0.8, 0.8, 0.81, 0.8]
    idle = find(hops_takeaways(hops_result(accuracy=rows)), "never trained")
    assert idle.holds is False
    assert "not because of the loops" in idle.text


def test_trained_hops_overthinking_and_loops_taken() -> None:
    found = hops_takeaways(hops_result())
    assert find(found, "lengths that training showed").holds
    assert find(found, "At 16 loops, 2 times the most in training").holds
    assert find(found, "rank correlation 0.97").holds
    rows = [list(row) for row in ACCURACY]
    rows[2] = [0.06, 0.1, 0.6, 0.7, 0.3]
    found = hops_takeaways(hops_result(accuracy=rows, rank_correlation=0.3))
    assert find(found, "not fully learnt").holds is False
    assert "falls by at most 0.400 ± 0.049 (4 hops)" in find(found, "overthinks").text
    assert find(found, "does not follow the difficulty").holds is False
    flat = hops_takeaways(hops_result(rank_correlation=None, exit_loops=[3.0] * 5))
    assert find(flat, "the same everywhere").holds is False


def test_leaks_are_said() -> None:
    assert find(hops_takeaways(hops_result()), "it does follow the walk").holds
    leaky = hops_result(leak_baselines={8: {"suffix": 0.7}})
    found = find(hops_takeaways(leaky), "proves nothing")
    assert found.holds is False
    assert "0.700 at 8 hops" in found.text


def test_original_halting_is_described_by_its_loops() -> None:
    taken, best, deciders = (
        item.text for item in halting_takeaways(hops_result(), halted_result())
    )
    assert "takes 1.1 loops whatever the length of the walk" in taken
    assert "without it is -0.720 ± 0.045 at 5 hops" in best
    assert best.endswith(": worse at 5 and 8 hops.")
    assert ": fewer at 5 and 8 hops. The accuracy" in deciders
    assert deciders.endswith(": worse at 5 and 8 hops.")
    same = [item.text for item in halting_takeaways(hops_result(), hops_result())]
    assert "takes 1.5 to 7.7 loops, more on longer walks" in same[0]
    assert same[1].endswith(": no clear difference at 5 and 8 hops.")
    erratic = hops_result(rank_correlation=0.1)
    assert "do not follow the length" in halting_takeaways(hops_result(), erratic)[0].text


def test_original_halting_is_compared_on_every_never_trained_length() -> None:
    """Equal at the first, better with fewer loops at the second: both are said."""
    rows = [list(row) for row in ACCURACY]
    rows[3][3:], rows[4][2:] = [0.81, 0.81], [0.9, 0.9, 0.9]
    better = hops_result(rows, [1.5, 2.2, 4.1, 5.0, 6.2], [1.0, 0.98, 0.9, 0.8, 0.9])
    _, best, deciders = (item.text for item in halting_takeaways(hops_result(), better))
    assert "+0.010 ± 0.010 at 5 hops, +0.300 ± 0.046 at 8 hops" in best
    assert best.endswith(": no clear difference at 5 hops, better at 8 hops.")
    assert "+0.00 ± 0.00 at 5 hops, -1.50 ± 0.05 at 8 hops" in deciders
    assert ": no clear difference at 5 hops, fewer at 8 hops. The accuracy" in deciders
    assert deciders.endswith("at 8 hops: no clear difference at 5 hops, better at 8 hops.")


def test_trace_says_what_rho_does_not() -> None:
    shrinking = trace_takeaway(loop_trace())
    assert shrinking.holds
    assert "each step is 0.50 times the one before" in shrinking.text
    assert "rho(A) is 0.450: a bound, no convergence" in shrinking.text
    wild = trace_takeaway(
        loop_trace(step_ratio=(None, 1.1, 1.1, 1.1), token_correlation=(0.99,) * 4, rho=None)
    )
    assert wild.holds is False
    assert "do not shrink" in wild.text
    assert "nearly become one" in wild.text
    assert "rho" not in wild.text


def test_takeaways_come_by_act() -> None:
    found = takeaways(demo_results())
    assert list(found) == ["Reading", "Thinking"]
    assert "original's halting" in found["Thinking"][-3].text
    without = takeaways(demo_results(original_halting=None))
    assert len(without["Thinking"]) == len(found["Thinking"]) - 3
