"""Planted power laws decide as they should."""

import math

import pytest

from experiments.docs_text import sizes_of, tiny
from experiments.power_laws.power_law import best_recurrence, power_law
from experiments.power_laws.run import ROWS, SEQ_LEN, STUDY, SWEEPS, steps_of
from experiments.run_store import Result, Results, Run
from openmythos.config import counts


def test_the_minimum_of_a_parabola() -> None:
    losses = {n: 2 + (math.log2(n) - 1.5) ** 2 for n in (1, 2, 4, 8)}
    assert best_recurrence(losses) == pytest.approx(2**1.5)
    assert best_recurrence({n: float(n) for n in (1, 2, 4, 8)}) is None  # lowest at an end
    assert best_recurrence({n: -((math.log2(n) - 1.5) ** 2) for n in (1, 2, 4, 8)}) is None
    assert best_recurrence({1: 2.0, 2: 1.0}) is None


def test_a_power_law_comes_back() -> None:
    law = power_law([1.0, 10.0, 100.0], [3.0, 3.0 * 10**0.4, 3.0 * 100**0.4])
    assert law is not None and law.exponent == pytest.approx(0.4) and law.fit == pytest.approx(1)
    assert power_law([1.0, 2.0], [1.0, 2.0]) is None
    uneven = power_law([1.0, 10.0, 100.0], [1.0, 9.0, 2.0])
    assert uneven is not None and uneven.fit < 0.5


def planted(powers: dict[int, float]) -> Results:
    """Losses whose best recurrence grows with these powers of the budget."""
    found = Results()
    sweep = SWEEPS["full"]
    for width, budgets in sweep.budgets.items():
        for flops in budgets:
            best = 1.8 * (flops / budgets[0]) ** powers[width]
            for loops in sweep.recurrences:
                data = {
                    "bits": 2 + (math.log2(loops) - math.log2(best)) ** 2,
                    "tokens": flops / (1e6 * (1 + loops)),
                }
                run = Run(f"w{width}_r{loops}", 0, {"flops": flops, "rate": 0.02})
                found.append(Result(run, data, None, 1, 1, "", ""))
    return found


def test_what_planted_exponents_decide() -> None:
    (same,) = STUDY.conclude(planted({96: 0.4, 160: 0.4})).verdicts
    assert same.decision == "holds" and same.number == pytest.approx(0.4)
    other = STUDY.conclude(planted({96: 0.1, 160: 0.6})).verdicts[0]
    assert other.decision in ("fails", "in part")
    edge = STUDY.conclude(planted({96: 0.4, 160: 2.0})).verdicts[0]
    assert edge.decision == "no result"
    assert "Of 8 budgets the loss is lowest at 3 with 2 loops, " in edge.sentence
    assert STUDY.conclude(Results()).verdicts[0].decision == "no result"
    conclusion = STUDY.conclude(planted({96: 0.4, 160: 0.4}))
    assert set(STUDY.draw(conclusion)) == set(conclusion.figures)


def test_a_budget_is_spent_whatever_the_loops() -> None:
    assert sizes_of("w160_r6") == (160, 6)
    for sweep in SWEEPS.values():
        for width, budgets in sweep.budgets.items():
            for loops in sweep.recurrences:
                each = counts.training_flops(tiny(width, loops), num_loops=loops, context_length=64)
                spent = steps_of(f"w{width}_r{loops}", budgets[0]) * ROWS * SEQ_LEN * each
                assert spent == pytest.approx(budgets[0], rel=0.03)


def test_tuning_comes_first() -> None:
    for scale, arms in (("small", 2 * 3), ("full", 2 * 6)):
        runs = list(STUDY.runs(scale, Results()))
        assert len(runs) == arms * 3 and all(run.tuning for run in runs)
