"""Counts by hand, and what altered numbers would decide."""

import copy
from typing import Any

import pytest

from experiments.published_numbers.counting import (
    cache_by_loops,
    counted,
    equal_tokens,
    sequences,
)
from experiments.published_numbers.run import STUDY
from experiments.run_store import Result, Results


@pytest.fixture(scope="module")
def results() -> Results:
    runs = STUDY.runs("small", Results())
    return Results(
        Result(run, STUDY.measure(run, "small", STUDY.folder), None, 1, 1, "", "") for run in runs
    )


def changed(results: Results, arm: str, *path: str, value: Any) -> Results:
    found = copy.deepcopy(results)
    (own,) = found.of(arm)
    data: Any = own.data
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value
    return found


def decision(results: Results, claim: str) -> str:
    verdicts = {each.claim: each.decision for each in STUDY.conclude(results).verdicts}
    return verdicts[claim]


def test_sizes_by_hand() -> None:
    loop, plain = counted("parcae-770m"), counted("parcae-gpt-1.3b")
    assert (loop["parameters"], plain["parameters"]) == (776_655_680, 1_333_868_544)
    # Two numbers of 1280 channels in each of 6 + 8 * 6 + 6 layers, two bytes each.
    assert loop["kv_bytes"] == {"per_loop": 2 * 2 * 1280 * 60, "last_loop": 2 * 2 * 1280 * 18}
    assert plain["kv_bytes"]["per_loop"] == 2 * 2 * 1536 * 24
    even = equal_tokens(loop, plain, "per_loop")
    assert even == pytest.approx(2 * (1_333_868_544 - 776_655_680) / (307_200 - 147_456))
    assert equal_tokens(loop, plain, "last_loop") is None
    assert sequences(1e10, loop, "per_loop", 2048) == int((1e10 - 2 * 776_655_680) / 2048 / 307_200)


def test_mla_compresses_each_loop_and_not_their_number() -> None:
    found = cache_by_loops("mythos-1b", (1, 2, 3))
    for kind in ("own", "uncompressed"):
        first, second, third = (found[kind][n] for n in "123")
        assert third - second == second - first > 0
    assert found["own"]["2"] < found["uncompressed"]["2"]


def test_every_claim_has_a_verdict(results: Results) -> None:
    conclusion = STUDY.conclude(results)
    assert [each.claim for each in conclusion.verdicts] == list(STUDY.claims)
    assert set(STUDY.draw(conclusion)) == {"memory"}
    assert {each.decision for each in STUDY.conclude(Results()).verdicts} == {"no result"}


def test_an_altered_number_flips_its_verdict(results: Results) -> None:
    weights = ("sizes", "parcae-770m", "weight_bytes")
    for claim, path, value in (
        ("smaller-more-compute", weights, 10**10),
        ("half-the-memory", weights, 10**10),
        ("equals-1-3b", ("sources", "quality", "parcae-770m", "core"), 20.0),
        ("mla-manageable", ("caches", "mythos-1b", "own", "8"), 10**9),
        ("huginn-largest", ("sources", "looped"), [{"model": "Huginn", "billions": 3.5}]),
        (
            "saunshi-5-to-10",
            ("sources", "hops"),
            [{"work": "Saunshi", "task": "walks", "trained": [5], "tested": [10]}],
        ),
    ):
        before = decision(results, claim)
        altered = changed(results, *path, value=value)
        if claim == "huginn-largest":
            altered.of("sources")[0].data["looped"][0].update(loops=1, source="none")
        assert decision(altered, claim) != before, claim
