import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.claim import (
    Claim,
    Conclusion,
    Found,
    Verdict,
    by_rule,
    graded,
    no_result,
    read_claims,
    verdict,
)
from experiments.interval import t_interval

CLAIM = {
    "name": "a",
    "article": "x.txt",
    "quote": "q",
    "rule": "Holds from `least` on, not at `most`.",
    "thresholds": {"least": 1},
    "would_change": "w",
}


def test_claims_are_read(tmp_path: Path) -> None:
    path = tmp_path / "expected.json"
    path.write_text(json.dumps({"claims": [CLAIM]}))
    claim = read_claims(path)["a"]
    assert claim.thresholds == {"least": 1}
    assert claim.rule_in_numbers == "Holds from 1 on, not at `most`."
    assert replace(claim, thresholds={}).rule_in_numbers == claim.rule
    for content in ({}, {"claims": [{"name": "a"}]}, {"claims": [CLAIM, CLAIM]}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"does not hold|twice"):
            read_claims(path)


def test_verdicts_and_digests() -> None:
    with pytest.raises(ValueError, match="the decision is 'yes'"):
        Verdict(claim="a", decision="yes", sentence="")  # type: ignore[arg-type]
    assert verdict("a", "holds", "s", t_interval([1.0])).interval is None  # one seed
    found = [
        Conclusion(verdicts=[], figures={"f": {"x": (value, 1)}})
        for value in (0.1, 0.1 + 1e-12, 0.2)
    ]
    digests = [conclusion.digest("f") for conclusion in found]
    assert digests[0] == digests[1] != digests[2]


def test_a_rule_decides_once_every_arm_has_three_seeds() -> None:
    claim = Claim(
        name="deeper", article="a", quote="q", rule="r", thresholds={"least": 0.5}, would_change="w"
    )

    def rule(limits: Mapping[str, float]) -> Found:
        number = t_interval([limits["least"], 0.7])
        return "holds", number, "Said."

    found = by_rule(claim, rule, {"one": 3, "two": 5}, "curve")
    assert (found.claim, found.decision, found.sentence) == ("deeper", "holds", "Said.")
    assert found.number == pytest.approx(0.6) and found.figure == "curve"
    without = by_rule(claim, lambda limits: ("fails", None, "None."), {"one": 3}, "curve")
    assert without.decision == "fails" and without.number is None and without.figure is None
    few = by_rule(claim, rule, {"one": 2, "two": 5, "three": 0}, "curve")
    assert few == no_result(claim, "Fewer than 3 seeds of one, three.")


@pytest.mark.parametrize(
    ("parts", "decision"),
    [((True, True), "holds"), ((True, False), "in part"), ((False, False), "fails")],
)
def test_what_has_parts_holds_in_part(parts: tuple[bool, ...], decision: str) -> None:
    assert graded(iter(parts)) == decision
