"""Planted losses decide as they should; the arms' caches have the same size; a run of each."""

from pathlib import Path

import pytest

from experiments.depth_attention.run import (
    ARMS,
    STUDY,
    bits_table,
    cache_bytes,
    decide,
    model_of,
)
from experiments.run_store import Result, Results, Run
from openmythos.config import counts


@pytest.mark.parametrize(
    ("plain", "last_loop", "decision"),
    [(2.1, 2.2, "holds"), (2.1, 1.9, "in part"), (1.9, 1.8, "fails"), (2.0, 2.0, "no result")],
)
def test_bits_at_equal_memory_decide(plain: float, last_loop: float, decision: str) -> None:
    found = Results()
    for arm, bits in zip(ARMS, (2.0, plain, last_loop), strict=True):
        for seed in range(3):
            data = {"bits": bits + 0.01 * seed, "bytes": 9}
            found.append(Result(Run(arm, seed, {"rate": 0.02}), data, None, 1, 1, "", ""))
    verdict = decide(STUDY.claims["depth-attention-at-matched-memory"], found)
    assert verdict.decision == decision
    assert verdict.number == pytest.approx(2.0 - min(plain, last_loop))
    assert [row[0] for row in bits_table(found).rows] == [*ARMS]


def test_arms_have_the_same_bytes_of_cache() -> None:
    assert len({cache_bytes(arm) for arm in ARMS}) == 1
    models = {arm: model_of(arm) for arm in ARMS}
    same = [counts.total_params(models[arm]) for arm in ARMS[:2]]
    assert same[0] == same[1]  # depth attention has no parameters


def test_few_seeds_decide_nothing() -> None:
    (verdict,) = STUDY.conclude(Results()).verdicts
    assert verdict.decision == "no result"
    assert set(STUDY.draw(STUDY.conclude(Results()))) == {"bits"}


@pytest.mark.parametrize("arm", ["depth_attention", "last_loop"])
def test_a_run(arm: str, tmp_path: Path) -> None:
    run = next(run for run in STUDY.runs("smoke", Results()) if run.arm == arm)
    data = STUDY.measure(run, "smoke", tmp_path)
    assert 2 < data["bits"] < 20 and data["bytes"] > 20
