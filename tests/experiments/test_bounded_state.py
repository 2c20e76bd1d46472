"""The state's norm and bound by hand, and what planted results decide."""

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bounded_state import verdicts
from experiments.bounded_state.fixed import INJECTIONS, bound, loops_shown, norms, random_model
from experiments.bounded_state.run import STUDY
from experiments.bounded_state.trained import spectral_radius
from experiments.run_store import Result, Results, Run

CLAIMS = STUDY.claims


def test_loops_shown() -> None:
    assert loops_shown(4000) == [1, 2, 4, 10, 20, 40, 100, 200, 400, 1000, 2000, 4000]
    assert loops_shown(30) == [1, 2, 4, 10, 20, 30]


@pytest.mark.parametrize("kind", ["lti", "add", "linear"])
def test_without_a_core_the_state_is_a_geometric_sum(kind: str) -> None:
    rho = {"lti": 0.9, "add": None, "linear": 1.05}[kind]
    model = random_model(INJECTIONS[kind], 0.0, rho, seed=1)
    tokens = torch.arange(5)[None]
    driven = model.encode(tokens, model.context(tokens)).detach()
    most = float(driven.norm(dim=-1).max())
    found = norms(model, [1, 3, 40])
    factor = 1.0 if rho is None else rho
    expected = [most * sum(factor**n for n in range(loops)) for loops in (1, 3, 40)]
    assert found == pytest.approx(expected, rel=1e-4)
    if kind == "lti":  # nothing but B e is left, and the state comes near the bound
        limit = bound(model)
        assert limit is not None and limit["residual"] == 0.0
        assert limit["bound"] == pytest.approx(most / 0.1, rel=1e-4)
        assert norms(model, [200]) == pytest.approx([limit["bound"]], rel=1e-3)
    assert (bound(model) is None) == (kind != "lti")


@pytest.mark.parametrize("kind", ["lti", "original_lti"])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_no_state_passes_the_bound(kind: str, scale: float) -> None:
    model = random_model(INJECTIONS[kind], scale, 0.8, seed=2, d_model=8)
    limit = bound(model)
    assert limit is not None and limit["rho"] == pytest.approx(0.8)
    found = [norm for norm in norms(model, [1, 2, 10, 100]) if norm is not None]
    assert len(found) == 4 and max(found) <= limit["bound"]


def test_growth_past_one_ends_in_no_number() -> None:
    model = random_model(INJECTIONS["linear"], 0.05, 4.0, seed=0, d_model=8)
    assert spectral_radius(model) == pytest.approx(4.0)
    assert norms(model, [10, 100])[1] is None


# --- planted results ------------------------------------------------------------------------------


def fixed(kind: str, rows: list[dict[str, Any]]) -> Result:
    run = Run(f"fixed_{kind}", 0, {"rhos": [row["rho"] for row in rows]})
    return Result(run, {"shown": [400, 1000, 4000], "rows": rows}, None, 1, 1, "", "")


def row(rho: float | None, values: list[float | None], limit: float | None) -> dict[str, Any]:
    return {"rho": rho, "scale": 1.0, "norms": values, "bound": limit}


def trained(
    kind: str, seed: int, accuracy: float, deep: float, rho: float | None = None, lost: bool = False
) -> Result:
    run = Run(f"trained_{kind}", seed, {"rate": 0.1, "train_loops": 4})
    data = {
        "accuracy": {"4": accuracy, "32": deep},
        "norms": {"4": 1.0, "256": 2.0},
        "rho": rho,
        "bound": {"bound": 10.0},
        "loss": 1.0,
    }
    return Result(run, {} if lost else data, "diverged" if lost else None, 1, 1, "", "")


def planted(far: float | None = None, lost: bool = False, broken: bool = True) -> Results:
    """LTI keeps to its bound and its answers; the others as the arguments say."""
    found = Results([
        fixed("lti", [row(0.9, [5.0, 6.0, 6.0], 8.0), row(0.9999, [50.0, 90.0, 99.0], 10_000.0)]),
        fixed("original_lti", [row(0.9, [5.0, 6.0, 6.0], 8.0)]),
        fixed("add", [row(None, [100.0, 250.0, 1000.0], None)]),
        fixed("linear", [row(1.05, [1e9, 1e30, far], None)]),
    ])  # fmt: skip
    for seed in (0, 1, 2):
        noise = 0.001 * seed
        for kind in ("lti", "original_lti"):
            found.append(trained(kind, seed, 0.9 + noise, 0.88 + noise, 0.6))
        found.append(trained("add", seed, 0.9, 0.9, lost=lost))
        found.append(trained("none", seed, 0.9 + noise, 0.2 + noise, lost=lost))
        found.append(trained("linear", seed, 0.3 if broken else 0.9, 0.2, 1.2))
    return found


def decisions(results: Results) -> dict[str, str]:
    return {each.claim: each.decision for each in STUDY.conclude(results).verdicts}


def test_what_planted_results_decide() -> None:
    assert decisions(planted()) == {
        "lti-cannot-grow": "holds",
        "activations-blow-up": "fails",
        "past-one-breaks": "holds",
        "drifts-into-noise": "holds",
    }
    harmless = planted(far=1e35, broken=False)
    assert decisions(harmless)["past-one-breaks"] == "fails"
    assert decisions(planted(broken=False))["past-one-breaks"] == "in part"
    assert decisions(planted(lost=True))["activations-blow-up"] == "in part"
    assert decisions(planted(lost=True))["drifts-into-noise"] == "no result"
    assert set(decisions(Results())) == set(CLAIMS)
    assert set(decisions(Results()).values()) == {"no result"}


def test_a_state_above_its_bound_is_a_failure() -> None:
    results = planted()
    results[0] = fixed("lti", [row(0.9, [5.0, 6.0, 8.1], 8.0)])
    (found, *_) = STUDY.conclude(results).verdicts
    assert found.decision == "fails" and found.number == pytest.approx(8.1 / 8)


def test_the_sentence_says_where_the_bound_is_useless() -> None:
    (found, *_) = STUDY.conclude(planted()).verdicts
    assert (
        "from rho 0.9999 (weights times 1) on" in found.sentence
        and "has 0.10 of plain addition's" in found.sentence
    )


def test_figures_are_drawn_from_planted_results() -> None:
    conclusion = STUDY.conclude(planted())
    assert set(STUDY.draw(conclusion)) == set(conclusion.figures) == {"norms", "outcomes"}
    assert verdicts.best_rate(planted(lost=True), "trained_none", 4) == []


def test_runs_are_known_from_the_start(tmp_path: Path) -> None:
    runs = STUDY.runs("small", Results())
    assert len({run.name for run in runs}) == len(runs) == 6 * 3 + 6 * 3 * 3 * 2
    assert not any(run.tuning for run in runs)
