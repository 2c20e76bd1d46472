"""Planted combiners of facts decide as they should; a run gives what the verdict reads."""

from pathlib import Path

import numpy as np
import pytest

from experiments.held_out_facts.run import (
    ARMS,
    KINDS,
    STUDY,
    decide,
    kinds_of,
    score_table,
    size_table,
)
from experiments.run_store import Result, Results, Run
from openmythos.data.synthetic import HopsConfig, Walks


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
    results = answered(dict(zip(ARMS, (loop, shallow, deep), strict=True)), facts)
    found = decide(claim, results)
    assert found.decision == decision
    assert found.number == pytest.approx(loop - max(shallow, deep))
    (rows, _) = score_table(results).rows, size_table()
    assert rows[-1][-1] == "0.005" and len(rows) == 4
    assert decide(claim, Results()).decision == "no result"


def test_walks_of_two_hops_are_of_three_kinds() -> None:
    walks = Walks(HopsConfig(num_entities=40, num_relations=6, held_out_facts=0.2))
    kinds = kinds_of(walks)
    assert len(kinds["facts"]) == 240
    passed = {kind: walks.num_alone(given) for kind, given in kinds.items() if kind != "facts"}
    assert {kind: {*count.tolist()} for kind, count in passed.items()} == {
        "trained": {0}, "same_facts": {0}, "new_facts": {2},
    }  # fmt: skip
    drawn = {tuple(row) for row in walks.sample_batch(3, 2, 500).tokens.tolist()}
    assert drawn <= {tuple(row) for row in kinds["trained"].tolist()}
    alone = walks.alone.mean()
    assert np.isclose(len(kinds["new_facts"]) / (40 * 36), alone**2, atol=0.03)


def test_rates_are_tuned_by_what_others_combine() -> None:
    tuning = STUDY.runs("full", Results())
    assert len(tuning) == 3 * 3 and all(run.tuning for run in tuning)
    done = Results()
    for run in tuning:
        score = -abs(run.settings["rate"] - 0.003)
        done.append(Result(run, {"same_facts": score, "new_facts": -score}, None, 1, 1, "", ""))
    runs = STUDY.runs("full", done)
    assert len(runs) == 3 * 6
    assert {run.settings["rate"] for run in runs if not run.tuning} == {0.003}


def test_a_run(tmp_path: Path) -> None:
    (run,) = STUDY.runs("smoke", Results())
    data = STUDY.measure(run, "smoke", tmp_path)
    assert all(0 <= data[kind] <= 1 for kind in KINDS)
    assert max(data["leaks"].values()) == pytest.approx(1 / 100)
