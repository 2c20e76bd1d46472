import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.claim import Conclusion, Verdict, read_claims, verdict
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
