"""A planted phi comes back and decides as it should; equal depth is equal FLOPs; a run."""

from pathlib import Path

import numpy as np
import pytest

from experiments.docs_text import sizes_of
from experiments.interval import t_interval
from experiments.iso_depth.run import (
    ARMS,
    LOOPS,
    SEEDS,
    STEPS,
    STUDY,
    WIDTHS,
    judged,
    model_of,
)
from experiments.run_store import Result, Results, Run
from openmythos.config import counts
from openmythos.plan.scaling_law import sizes


def planted(phi: float, noise: float = 0.003) -> Results:
    """Every run with the loss that a law of this phi gives it."""
    found = Results()
    for arm in ARMS:
        (once, loop), loops = sizes(model_of(arm)), sizes_of(arm)[1]
        for seed in SEEDS:
            drawn = np.random.default_rng((seed, *arm.encode())).normal(0, noise, len(STEPS))
            for steps, off in zip(STEPS, drawn.tolist(), strict=True):
                tokens = steps * 2048
                size = once + loops**phi * loop
                bits = 1 + 40 * size**-0.35 + 600 * tokens**-0.5 + off
                run = Run(arm, seed, {"steps": steps, "rate": 0.02})
                found.append(Result(run, {"bits": bits, "tokens": tokens}, None, 1, 1, "", ""))
    return found


@pytest.mark.parametrize(
    ("phi", "decision"), [(0.46, "holds"), (0.8, "in part"), (1.3, "fails"), (-0.3, "fails")]
)
def test_a_planted_phi_comes_back(phi: float, decision: str) -> None:
    conclusion = STUDY.conclude(planted(phi))
    (verdict,) = conclusion.verdicts
    assert verdict.decision == decision
    assert verdict.number == pytest.approx(phi, abs=0.1)
    constants, losses = conclusion.tables
    assert len(constants.rows) == len(SEEDS)
    assert len(losses.rows) == len(WIDTHS) * (len(STEPS) + 1)
    assert set(STUDY.draw(conclusion)) == set(conclusion.figures)


def test_wide_intervals_and_few_runs_decide_nothing() -> None:
    assert judged(t_interval([-0.2, 0.5]), 0.46) == "no result"
    assert judged(t_interval([0.5, 1.4]), 0.46) == "no result"
    assert STUDY.conclude(Results()).verdicts[0].decision == "no result"
    alone = Results(r for r in planted(0.46) if r.run.seed == 0)
    assert STUDY.conclude(alone).verdicts[0].decision == "no result"


def test_equal_depth_costs_the_same() -> None:
    for width in WIDTHS:
        models = [model_of(f"w{width}_r{loops}") for loops in LOOPS]
        assert [model.num_core_layers * model.num_loops for model in models] == [6] * len(LOOPS)
        once = [counts.forward_flops(m, context_length=128) for m in models]
        assert max(once) - min(once) < 0.05 * min(once)  # what is injected, per loop
        params = [counts.total_params(model) for model in models]
        assert params == sorted(params, reverse=True)


def test_a_run(tmp_path: Path) -> None:
    (run,) = STUDY.runs("smoke", Results())
    data = STUDY.measure(run, "smoke", tmp_path)
    assert 2 < data["bits"] < 20 and data["tokens"] == 2048
