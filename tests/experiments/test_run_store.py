import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.run_store import Result, Run, RunStore, digest


def test_a_run_is_its_arm_seed_and_settings() -> None:
    run = Run("a", 1, {"rate": 0.1, "hops": (1, 2)})
    assert run == Run("a", 1, {"hops": [1, 2], "rate": 0.1})
    assert run.name == replace(run, tuning=True).name
    others = [Run("b", 1, run.settings), Run("a", 2, run.settings), Run("a", 1, {"rate": 0.1})]
    assert len({run.name, *(other.name for other in others)}) == 4
    with pytest.raises(ValueError, match="small letters"):
        Run("A/b", 0)
    with pytest.raises(ValueError, match="JSON"):
        Run("a", 0, {"rate": float("nan")})
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_results_are_read_back_and_alterations_refused(tmp_path: Path) -> None:
    store, run = RunStore(tmp_path), Run("a", 1, {"rate": 0.1})
    done = Result(run, {"x": [1]}, None, 1.5, 1.25, "p", "t")
    lost = Result(Run("a", 0, {"rate": 0.1}), {}, "killed", 1.5, 1.25, "p", "t")
    tuning = replace(done, run=Run("a", 99, {"rate": 0.1}, tuning=True))
    for result in (done, lost, tuning):
        store.add(result)
    found = store.read()
    assert found.find(run) == done and found.lost == [lost] and found.of("a") == [done]
    assert list(store.strangers([run, tuning.run])) == [store.path(lost.run)]
    store.forget(found.lost)
    assert len(store.read()) == 2
    path = store.path(run)
    rows = {"rows": [[0.5, None, -1e-05], [1, 2]], "words": ["a [ 1, 2 ]"], "none": []}
    store.add(replace(done, data=rows))
    assert '"rows": [\n   [0.5, null, -1e-05],\n   [1, 2]\n  ]' in path.read_text()
    assert store.read().find(run) == replace(done, data=rows)
    path.write_text(json.dumps(json.loads(path.read_text())))
    store.tidy()
    assert "[1, 2]\n" in path.read_text() and store.read().find(run) == replace(done, data=rows)
    stored = json.loads(path.read_text())
    stored["run"]["seed"] = 2
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="were changed"):
        store.read()
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a stored result"):
        store.read()
