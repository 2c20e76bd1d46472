"""Planted power laws, planted combiners of facts and planted losses decide as they should."""

import math
from pathlib import Path

import numpy as np
import pytest

from experiments.long_runs import depth_attention, two_hops
from experiments.long_runs.power_law import best_recurrence, power_law
from experiments.long_runs.recurrence import BUDGETS, RECURRENCES, WIDTHS, recipe, sizes_of
from experiments.long_runs.run import STUDY
from experiments.run_store import Result, Results, Run
from openmythos.config import counts
from openmythos.data.synthetic import HopsConfig, Walks


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
    for width in WIDTHS:
        for flops in BUDGETS[width]:
            best = 1.8 * (flops / BUDGETS[width][0]) ** powers[width]
            for loops in RECURRENCES:
                data = {
                    "bits": 2 + (math.log2(loops) - math.log2(best)) ** 2,
                    "tokens": flops / (1e6 * (1 + loops)),
                }
                run = Run(f"w{width}_r{loops}", 0, {"flops": flops, "rate": 0.02})
                found.append(Result(run, data, None, 1, 1, "", ""))
    return found


def test_what_planted_exponents_decide() -> None:
    same, *others = STUDY.conclude(planted({96: 0.4, 160: 0.4})).verdicts
    assert {verdict.decision for verdict in others} == {"no result"}
    assert same.decision == "holds" and same.number == pytest.approx(0.4)
    other = STUDY.conclude(planted({96: 0.1, 160: 0.6})).verdicts[0]
    assert other.decision in ("fails", "in part")
    edge = STUDY.conclude(planted({96: 0.4, 160: 2.0})).verdicts[0]
    assert edge.decision == "no result"
    assert STUDY.conclude(Results()).verdicts[0].decision == "no result"
    conclusion = STUDY.conclude(planted({96: 0.4, 160: 0.4}))
    assert set(STUDY.draw(conclusion)) == set(conclusion.figures)


def test_a_budget_is_spent_whatever_the_loops() -> None:
    assert sizes_of("w160_r6") == (160, 6)
    for loops in RECURRENCES:
        config = recipe(96, loops, 0, {"flops": 4e12, "rate": 0.02}, "python-docs")
        each = counts.training_flops(config.model, num_loops=loops, context_length=128)
        steps = config.train.max_steps
        assert steps is not None and steps * 8 * 256 * each == pytest.approx(4e12, rel=0.01)


def test_tuning_comes_first() -> None:
    runs = list(STUDY.runs("full", Results()))
    assert len(runs) == (2 * 6 + 3 + 3) * 3 and all(run.tuning for run in runs)


def answered(new: dict[str, float], facts: float = 1.0) -> Results:
    """Three seeds of each arm that answer so many walks over new facts."""
    found = Results()
    for arm, share in new.items():
        for seed in range(3):
            kinds = {"facts": facts, "trained": 1.0, "same_facts": 0.9}
            data = {**kinds, "new_facts": share + 0.01 * seed, "leaks": {"chance": 0.005}}
            found.append(Result(Run(arm, seed, {"rate": 0.003}), data, None, 1, 1, "", ""))
    return found


@pytest.mark.parametrize(
    ("loop", "shallow", "deep", "facts", "decision"),
    [
        (0.8, 0.0, 0.05, 1.0, "holds"),
        (0.8, 0.0, 0.3, 1.0, "in part"),
        (0.3, 0.0, 0.05, 1.0, "in part"),
        (0.05, 0.0, 0.0, 1.0, "fails"),
        (0.3, 0.0, 0.6, 1.0, "fails"),
        (0.3, 0.3, 0.0, 1.0, "no result"),
        (0.8, 0.0, 0.0, 0.5, "not decidable here"),
    ],
)
def test_who_combines_new_facts_decides(
    loop: float, shallow: float, deep: float, facts: float, decision: str
) -> None:
    claim = STUDY.claims["two-hops-over-held-out-facts"]
    results = answered(dict(zip(two_hops.ARMS, (loop, shallow, deep), strict=True)), facts)
    found = two_hops.decide(claim, results)
    assert found.decision == decision
    assert found.number == pytest.approx(loop - max(shallow, deep))
    (rows, _) = two_hops.score_table(results).rows, two_hops.size_table()
    assert rows[-1][-1] == "0.005" and len(rows) == 4
    assert two_hops.decide(claim, Results()).decision == "no result"


def test_walks_of_two_hops_are_of_three_kinds() -> None:
    walks = Walks(HopsConfig(num_entities=40, num_relations=6, held_out_facts=0.2))
    kinds = two_hops.kinds_of(walks)
    assert len(kinds["facts"]) == 240
    passed = {kind: walks.num_alone(given) for kind, given in kinds.items() if kind != "facts"}
    assert {kind: {*count.tolist()} for kind, count in passed.items()} == {
        "trained": {0}, "same_facts": {0}, "new_facts": {2},
    }  # fmt: skip
    drawn = {tuple(row) for row in walks.sample_batch(3, 2, 500).tokens.tolist()}
    assert drawn <= {tuple(row) for row in kinds["trained"].tolist()}
    alone = walks.alone.mean()
    assert np.isclose(len(kinds["new_facts"]) / (40 * 36), alone**2, atol=0.03)


@pytest.mark.parametrize(
    ("plain", "last_loop", "decision"),
    [(2.1, 2.2, "holds"), (2.1, 1.9, "in part"), (1.9, 1.8, "fails"), (2.0, 2.0, "no result")],
)
def test_bits_at_equal_memory_decide(plain: float, last_loop: float, decision: str) -> None:
    found = Results()
    for arm, bits in zip(depth_attention.ARMS, (2.0, plain, last_loop), strict=True):
        for seed in range(3):
            data = {"bits": bits + 0.01 * seed, "bytes": 9}
            found.append(Result(Run(arm, seed, {"rate": 0.02}), data, None, 1, 1, "", ""))
    verdict = depth_attention.decide(STUDY.claims["depth-attention-at-matched-memory"], found)
    assert verdict.decision == decision
    assert verdict.number == pytest.approx(2.0 - min(plain, last_loop))
    assert [row[0] for row in depth_attention.bits_table(found).rows] == [*depth_attention.ARMS]


def test_arms_have_the_same_bytes_of_cache() -> None:
    assert len({depth_attention.cache_bytes(arm) for arm in depth_attention.ARMS}) == 1
    models = {arm: depth_attention.model_of(arm) for arm in depth_attention.ARMS}
    same = [counts.total_params(models[arm]) for arm in depth_attention.ARMS[:2]]
    assert same[0] == same[1]  # depth attention has no parameters


@pytest.mark.parametrize("arm", ["facts_loop", "cache_depth_attention", "cache_last_loop"])
def test_a_run_of_each_new_part(arm: str, tmp_path: Path) -> None:
    run = next(run for run in STUDY.runs("smoke", Results()) if run.arm == arm)
    data = STUDY.measure(run, "smoke", tmp_path)
    if arm == "facts_loop":
        assert all(0 <= data[kind] <= 1 for kind in two_hops.KINDS)
        assert max(data["leaks"].values()) == pytest.approx(1 / 200)
    else:
        assert 2 < data["bits"] < 20 and data["bytes"] > 20
