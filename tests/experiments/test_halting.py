import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.halting import exits
from experiments.halting.arm import ACT_ARMS, ARMS, MOST_LOOPS, PLAIN, PONDERNET, SHALLOW, STEPPING
from experiments.halting.conclude import VERDICTS, chosen_rule, saved_by_rule, wasted
from experiments.halting.exits import RULES, Watched, follows_difficulty, learnt, record, watch
from experiments.halting.run import HOPS, SIZES, STUDY
from experiments.run_store import Result, Results, Run
from openmythos.config import ACTConfig
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.demo.walks import hops_config
from openmythos.engine.reference import generate
from openmythos.eval.calibration import Observed
from openmythos.model.exit import CumulativeThreshold, EntropyKLExit, Rule
from tests.strategies import random_model, small_config

WALKS = Walks(HopsConfig(seed=3))


# --- what exits do --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [*RULES[::3], CumulativeThreshold(threshold=0.6)], ids=lambda rule: rule.kind
)
def test_following_a_rule_equals_decoding_with_it(rule: Rule) -> None:
    shape: dict[str, Any] = {"vocab_size": WALKS.vocab_size, "num_coda_layers": 0}
    config = small_config(**shape, halting=ACTConfig(bias_init=-1.0))
    model, most = random_model(config), 6
    walks = watch(model, WALKS, 4, count=24, seed=5, most=most)
    batch = WALKS.held_out_batch(4, 24, seed=5)
    decoded = generate(
        model, batch.tokens, max_new_tokens=1, num_loops=most, exit_rule=rule, return_logits=True
    )
    taken = walks.seen.loops(rule)
    assert [[n] for n in taken.tolist()] == decoded.loops
    assert decoded.logits is not None
    mine = torch.stack(walks.seen.logits)[taken - 1, torch.arange(24)]
    assert torch.allclose(mine, torch.cat(decoded.logits), atol=1e-5)
    given = [new[0] for new in decoded.tokens]
    right = [a == b for a, b in zip(given, walks.answers.tolist(), strict=True)]
    assert walks.follow(rule)["right"] == pytest.approx(sum(right) / 24)


def watched(predictions: list[list[int]], answers: list[int]) -> Watched:
    """Walks whose predictions after each loop are given, with a state that never changes."""
    logits = [torch.nn.functional.one_hot(torch.tensor(p), 4).float() * 9 for p in predictions]
    h = [torch.ones(len(answers), 2)] * len(predictions)
    return Watched(Observed(h[0], h, logits, None), torch.tensor(answers))


def test_settling_and_waste_by_hand() -> None:
    walks = watched([[0, 1, 2], [1, 1, 2], [1, 1, 0], [1, 3, 2]], answers=[1, 3, 2])
    assert walks.settled().tolist() == [2, 4, 4]
    assert walks.accuracy() == [pytest.approx(n / 3) for n in (1, 2, 1, 3)]
    stable = walks.follow(EntropyKLExit(kl=0.01, entropy=1.0))  # two equal predictions
    assert stable["loops"] == [0, 2, 1, 0]  # walks 2 and 3 after loop 2, walk 1 after loop 3
    assert stable["right"] == pytest.approx(2 / 3)  # and loses walk 2
    assert stable["wasted"] == pytest.approx(1 / 7)  # loop 3 of walk 1
    assert (stable["settled_early"], stable["halted_of_them"]) == (1, 1)
    assert walks.up_to(3).settled().tolist() == [2, 1, 3]


def test_what_a_run_stores() -> None:
    config = small_config(vocab_size=WALKS.vocab_size, halting=ACTConfig())
    found = record(random_model(config), WALKS, (1, 3), count=16, most=4)
    assert list(found["accuracy"]) == ["1", "3"] and len(found["accuracy"]["3"]) == 8
    assert len(found["rules"]) == len(RULES)
    for each in (found["own"], *found["rules"]):
        assert sum(each["test"]["3"]["loops"]) == 16
        assert 1 <= each["calibration"]["3"][0] <= 4
    assert sum(found["settled"]["3"]) == 16
    assert found["leaks"]["3"]["chance"] == 1 / 16
    plain = record(random_model(small_config(vocab_size=20)), WALKS, (1,), count=4, most=2)
    assert plain["own"] is None and plain["own_deep"] is None


# --- verdicts -------------------------------------------------------------------------------------


def exit_record(loops: Callable[[int], int], right: float, settled: int = 1) -> dict[str, Any]:
    """All walks of n hops take ``loops(n)`` loops."""
    test = {}
    for n in HOPS:
        taken = max(1, min(MOST_LOOPS, loops(n)))
        test[str(n)] = {
            "loops": [100 * (k == taken) for k in range(1, MOST_LOOPS + 1)],
            "right": right,
            "wasted": max(0, taken - settled) / taken,
            "settled_early": 100,
            "halted_of_them": 100 * (taken < MOST_LOOPS),
        }
    brief = {n: [1 + each["loops"].index(100), right] for n, each in test.items()}
    return {"rule": {"kind": "kl", "threshold": 1.0}, "test": test, "calibration": brief}


def outcome(
    loops: Callable[[int], int],
    right: float = 1.0,
    *,
    best: float = 1.0,
    deep: float = 1.0,
    rules: tuple[tuple[Callable[[int], int], float], ...] = (),
    settled: int = 1,
) -> dict[str, Any]:
    """What a run stores if its own halting takes ``loops(n)``, and from 4 loops on ``best``."""
    curve = [0.1] * 3 + [best] * 5 + [deep] * 8
    own = exit_record(loops, right, settled)
    return {
        "accuracy": {str(n): curve for n in HOPS},
        "calibration": {str(n): curve[:MOST_LOOPS] for n in HOPS},
        "settled": {str(n): [100] + [0] * 7 for n in HOPS},
        "own": own,
        "own_deep": own["calibration"],
        "rules": [exit_record(*rule) for rule in rules],
        "leaks": {str(n): {"chance": 1 / 16} for n in HOPS},
        "stages": {"8": 700},
        "learnt": best,
        "equal_accuracy": {
            "step": 600,
            "accuracy": {str(n): curve for n in HOPS},
            "own": {"test": own["test"]},
        },
    }


def results(outcomes: dict[str, dict[str, Any]]) -> Results:
    """Three equal seeds of each arm."""
    return Results(
        Result(Run(arm, seed, {"rate": 1.0}), data, None, 1.0, 1.0, "a processor", "2")
        for arm, data in outcomes.items()
        for seed in (0, 1, 2)
    )


def decided(claim: str, outcomes: dict[str, dict[str, Any]]) -> str:
    return VERDICTS[claim](STUDY.claims[claim], results(outcomes)).decision


def half(n: int) -> int:
    return (n + 1) // 2


NO_COST = [ACT_ARMS["fixed"][0].name, ACT_ARMS["variable"][0].name, SHALLOW.name]


@pytest.mark.parametrize(
    ("loops", "best", "expected"),
    [
        (lambda n: 8, 1.0, "holds"),
        (half, 1.0, "fails"),
        (lambda n: 8 if n > 2 else 1, 1.0, "in part"),
        (lambda n: 8, 0.5, "no result"),
    ],
)
def test_always_the_maximum(loops: Callable[[int], int], best: float, expected: str) -> None:
    outcomes = {arm: outcome(loops, best=best) for arm in NO_COST}
    assert decided("without-cost-always-the-maximum", outcomes) == expected


def test_one_arm_at_the_maximum_is_in_part() -> None:
    outcomes = {arm: outcome(half) for arm in NO_COST} | {NO_COST[0]: outcome(lambda n: 8)}
    assert decided("without-cost-always-the-maximum", outcomes) == "in part"


@pytest.mark.parametrize(
    ("loops", "expected"),
    [(lambda n: 1, "holds"), (lambda n: 2, "fails"), (lambda n: 1 + n % 2, "in part")],
)
def test_collapse(loops: Callable[[int], int], expected: str) -> None:
    outcomes = {arm: outcome(loops) for arm in NO_COST[1:]}
    assert decided("without-cost-collapse-to-one-loop", outcomes) == expected
    assert decided("without-cost-collapse-to-one-loop", {}) == "no result"


@pytest.mark.parametrize(
    ("fixed", "variable", "expected"),
    [
        ((8, 6, 4, 2), (5, 4, 3, 2), "holds"),
        ((8, 6, 4, 2), (5, 5, 5, 5), "in part"),
        ((8, 4, 6, 2), (5, 3, 4, 2), "in part"),  # it falls, but not at every rise
        ((5, 5, 5, 5), (2, 3, 4, 5), "fails"),
    ],
)
def test_cost_sets_depth(fixed: tuple[int, ...], variable: tuple[int, ...], expected: str) -> None:
    outcomes = {
        arm.name: outcome(lambda n, taken=taken: taken)  # type: ignore[misc]
        for depth, loops in (("fixed", fixed), ("variable", variable))
        for arm, taken in zip(ACT_ARMS[depth], loops, strict=True)
    }
    assert decided("cost-sets-depth", outcomes) == expected


COSTLY = [arm.name for arms in ACT_ARMS.values() for arm in arms if arm.cost]


def test_easy_few_hard_many() -> None:
    name = "easy-few-hard-many-nothing-wasted"
    follows = outcome(lambda n: n, settled=8)
    wasteful = outcome(lambda n: n, settled=1)
    level = outcome(lambda n: 4)
    wrong = outcome(lambda n: n, right=0.9, settled=8)
    assert decided(name, dict.fromkeys(COSTLY, level) | {COSTLY[0]: follows}) == "holds"
    assert decided(name, dict.fromkeys(COSTLY, level) | {COSTLY[0]: wasteful}) == "in part"
    assert decided(name, dict.fromkeys(COSTLY, level)) == "fails"
    assert decided(name, dict.fromkeys(COSTLY, wrong)) == "fails"
    assert decided(name, {}) == "no result"


def test_converged_halt_early() -> None:
    name = "converged-halt-early"
    early, late = outcome(lambda n: 4), outcome(lambda n: 8)
    wrong = outcome(lambda n: 4, right=0.5)
    assert decided(name, dict.fromkeys(COSTLY, early)) == "holds"
    assert decided(name, dict.fromkeys(COSTLY, late)) == "fails"
    assert decided(name, dict.fromkeys(COSTLY, early) | {COSTLY[0]: late}) == "in part"
    assert decided(name, dict.fromkeys(COSTLY, wrong)) == "not decidable here"


def test_overthinking() -> None:
    name = "halting-prevents-overthinking"

    def arms(by_rule: float, by_head: float, deep: float) -> dict[str, dict[str, Any]]:
        stepping = outcome(half, deep=deep, rules=((half, by_rule),))
        stepping["accuracy"]["8"] = [0.1] * 3 + [1.0] * 2 + [deep] * 11
        return {STEPPING.name: stepping, PONDERNET.name: outcome(half, by_head, deep=deep)}

    assert decided(name, arms(1.0, 1.0, deep=0.3)) == "holds"
    assert decided(name, arms(0.5, 1.0, deep=0.3)) == "in part"
    assert decided(name, arms(0.5, 0.5, deep=0.3)) == "fails"
    assert decided(name, arms(0.5, 0.5, deep=1.0)) == "not decidable here"
    assert decided(name, {}) == "no result"


def test_rule_beats_fixed() -> None:
    name = "rule-beats-fixed-depth"

    def plain(*rules: tuple[Callable[[int], int], float]) -> dict[str, dict[str, Any]]:
        return {PLAIN.name: outcome(half, rules=rules)}

    # Up to eight hops in half as many loops: 2.5 on average, against four.
    assert saved_by_rule(plain((half, 1.0))[PLAIN.name], 0.01) == (pytest.approx(0.375), 0.0, 4)
    assert decided(name, plain((half, 1.0))) == "holds"
    assert decided(name, plain((half, 0.5))) == "fails"  # not chosen: nothing is saved
    assert decided(name, plain((lambda n: 4 - (n == 1), 1.0))) == "in part"
    assert decided(name, {}) == "no result"
    both = plain((half, 0.5), (lambda n: 5, 1.0))[PLAIN.name]
    assert chosen_rule(both, 0.01, ["1", "8"]) is both["rules"][1]


def test_confidence_matches_learnt_halting() -> None:
    name = "confidence-matches-learnt-halting"
    heads = [arm.name for arms in ACT_ARMS.values() for arm in arms] + [PONDERNET.name]
    learnt = {arm: outcome(lambda n: 3) for arm in heads}
    good, late = ((lambda n: 3, 1.0),), ((lambda n: 4, 1.0),)
    assert decided(name, learnt | {PLAIN.name: outcome(half, rules=good)}) == "holds"
    assert decided(name, learnt | {PLAIN.name: outcome(half, rules=late)}) == "fails"
    one = learnt | {heads[0]: outcome(lambda n: 4)}
    assert decided(name, one | {PLAIN.name: outcome(half, rules=late)}) == "in part"
    assert decided(name, learnt) == "no result"


def test_numbers_by_hand() -> None:
    data = outcome(lambda n: n, settled=4)
    # Loops 5 to 8 of the four longest lengths: 1 + 2 + 3 + 4 of 36.
    assert wasted(data) == pytest.approx(10 / 36)
    assert follows_difficulty(data["own"]["test"], range(1, 9)) == pytest.approx(1.0)
    assert follows_difficulty(outcome(lambda n: 3)["own"]["test"], range(1, 9)) == 0.0


def test_the_table_at_equal_training_accuracy() -> None:
    own = outcome(lambda n: n, right=0.75, best=0.9)
    never = {**outcome(lambda n: 1), "equal_accuracy": None}
    planting = {PONDERNET.name: own, ACT_ARMS["fixed"][3].name: never}
    tables = STUDY.conclude(results(planting)).tables
    (table,) = (t for t in tables if "equal training accuracy" in t.title)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows[PONDERNET.in_words] == [
        "3 of 3", "600", "4.500 ± 0.000", "0.750 ± 0.000", "1.000 ± 0.000", "0.900 ± 0.000",
        "1.000 ± 0.000", "1.000 ± 0.000",
    ]  # fmt: skip
    assert rows[ACT_ARMS["fixed"][3].in_words] == ["0 of 3", *[""] * 7]


def test_what_is_learnt_is_asked_at_the_trained_loops() -> None:
    config = small_config(vocab_size=WALKS.vocab_size, num_loops=3)
    model = random_model(config)
    found = learnt(PLAIN, model, WALKS, 16)
    shares = [watch(model, WALKS, n, 16, exits.CALIBRATION, 5).accuracy()[2] for n in range(1, 9)]
    assert found == pytest.approx(sum(shares) / 8)
    assert learnt(STEPPING, model, WALKS, 16) == pytest.approx(shares[-1])


# --- the study ------------------------------------------------------------------------------------


def test_every_arm_is_a_run_of_its_own() -> None:
    settings = [arm.settings(10, 8) for arm in ARMS.values()]
    assert len({str(each) for each in settings}) == len(ARMS) == 12
    for arm in ARMS.values():
        config = arm.config(seed=4, rate=0.5, steps=7)
        assert config.train.max_steps == 7 and config.train.seed == 4
        assert config.train.optimizer.lr == 0.5 * hops_config(0, 1.0).train.optimizer.lr
        assert config.model.halting == arm.halting
    costs = [arm.config(0, 1.0, 1).train.objective for arm in ACT_ARMS["fixed"]]
    assert [getattr(objective, "ponder_weight", math.nan) for objective in costs] == [
        0,
        0.01,
        0.1,
        1,
    ]


def test_tuning_comes_first_and_then_three_seeds_of_every_arm() -> None:
    first = STUDY.runs("small", Results())
    assert len(first) == 3 * len(ARMS) and all(run.tuning for run in first)
    ended = Results(
        Result(run, {"learnt": 1 - abs(run.settings["rate"] - 1)}, None, 1.0, 1.0, "cpu", "2")
        for run in first
    )
    runs = STUDY.runs("small", ended)
    assert sum(not run.tuning for run in runs) == 3 * len(ARMS)
    assert {run.settings["rate"] for run in runs if not run.tuning} == {1.0}


def test_a_run_of_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "RULES", RULES[:2])
    monkeypatch.setitem(SIZES, "smoke", (1, 2))
    run = next(run for run in STUDY.runs("smoke", Results()) if run.arm == "act_variable_2")
    data = STUDY.measure(run, "smoke", tmp_path)
    assert data["stages"] == {"1": 1} and 0 <= data["learnt"] <= 1
    conclusion = STUDY.conclude(results({"act_variable_2": dict(data)}))
    assert [verdict.claim for verdict in conclusion.verdicts] == list(STUDY.claims)
    pictures = STUDY.draw(conclusion)
    assert pictures.keys() == conclusion.figures.keys()
