import pytest

from experiments.run_store import Result, Results, Run
from experiments.tuning import TUNING_SEED, tuned

RATES = (0.1, 0.2, 0.4)


def result(rate: float, score: float, lost: str | None = None) -> Result:
    run = Run("a", TUNING_SEED, {"rate": rate}, tuning=True)
    return Result(run, {"score": score}, lost, 1.0, 1.0, "p", "t")


def choose(done: list[Result]) -> tuple[list[float], float | None]:
    choice = tuned(Results(done), "a", {}, RATES, lambda r: r.data["score"])
    assert all(run.tuning and run.seed == TUNING_SEED for run in choice.runs)
    return [run.settings["rate"] for run in choice.runs], choice.rate


def test_three_rates_and_one_more_at_an_edge() -> None:
    middle, low = [result(0.1, 0.3), result(0.2, 0.5), result(0.4, 0.1)], result(0.05, 0.2)
    assert choose([]) == ([0.1, 0.2, 0.4], None)
    assert choose(middle[:2]) == ([0.1, 0.2, 0.4], None)
    assert choose(middle) == ([0.1, 0.2, 0.4], 0.2)
    edge = [result(0.1, 0.6), *middle[1:]]
    assert choose(edge) == ([0.1, 0.2, 0.4, 0.05], None)
    assert choose([*edge, low]) == ([0.1, 0.2, 0.4, 0.05], 0.1)
    high = [*middle[:2], result(0.4, 0.6)]
    assert choose([*high, result(0.8, 0.7)]) == ([0.1, 0.2, 0.4, 0.8], 0.8)  # no fifth


def test_ties_go_to_the_middle_and_lost_rates_never_win() -> None:
    assert choose([result(rate, 1.0) for rate in RATES])[1] == 0.2
    lost = [result(0.1, 1.0, "nan"), result(0.2, 0.1), result(0.4, 1.0, "nan")]
    assert choose(lost)[1] == 0.2
    assert choose([result(rate, 1.0, "nan") for rate in RATES]) == ([0.1, 0.2, 0.4], None)
    with pytest.raises(ValueError, match="give three"):
        tuned(Results(), "a", {}, (0.1, 0.2), lambda r: 0.0)
