"""Arms that match, accuracies by hand, and what planted results decide."""

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.run_store import Result, Results, Run
from experiments.tuning import TUNING_SEED
from experiments.wins_and_losses.arm import (
    BATCH,
    LEVELS,
    TASKS,
    accuracies,
    model_config,
    recipe,
    train_and_measure,
)
from experiments.wins_and_losses.run import ARMS, RATES, SEEDS, STUDY
from openmythos.config import counts
from openmythos.data.puzzle_table import make_puzzle
from openmythos.model.recurrent import RecurrentDepthLM


@pytest.mark.parametrize("task", TASKS)
def test_arms_have_equal_parameters_or_equal_flops(task: str) -> None:
    loop, shallow, deep = (model_config(arm, task) for arm in ("loop", "shallow", "deep"))
    assert counts.total_params(loop) == counts.total_params(shallow) < counts.total_params(deep)
    flops = [counts.training_flops(c, context_length=8) for c in (loop, shallow, deep)]
    assert flops[0] == flops[2] > flops[1]
    longest = recipe("loop", task, 0, 0.01, 5).data.seq_len
    assert longest <= loop.max_seq_len


@pytest.mark.parametrize("task", TASKS)
def test_accuracies_of_a_model_that_always_says_the_same(task: str) -> None:
    puzzle = make_puzzle(TASKS[task], 0)
    model = RecurrentDepthLM(model_config("loop", task), 0)
    size = puzzle.max_train_size
    targets = puzzle.held_out_batch(size, 64, seed=1).targets
    said = int(targets[0, -1])
    real = model.forward

    def forward(tokens: torch.Tensor, **options: Any) -> Any:
        output = real(tokens, **options)
        output.logits.zero_()
        output.logits[..., said] = 1.0
        return output

    model.forward = forward  # type: ignore[method-assign]
    counted = targets[:, 1:] if task == "products" else targets[:, -1:]
    expected = float((counted == said).float().mean())
    found = accuracies(model, puzzle, size, 1, 64)
    assert found["held_out"] == pytest.approx(expected) and 0 < found["held_out"] < 1
    if task == "products":
        assert found["held_out_by_place"] == pytest.approx(
            (targets == said).float().mean(dim=0).tolist()
        )


def result(name: str, seed: int, accuracy: float) -> Result:
    data: dict[str, Any] = {
        "accuracy": accuracy,
        "trained": accuracy,
        "by_size": {"1": {"held_out": accuracy}},
        "beyond": {"longer": accuracy / 2},
        "leaks": {"1": {"chance": 0.1}},
    }
    low, high = map(str, LEVELS[name.partition("_")[0]])
    data["equal_accuracy"] = {low: {**data, "step": 100 + 10 * seed}, high: None}
    return Result(Run(name, seed, {"rate": 0.01}), data, None, 1, 1, "", "")


def planted(**means: float) -> Results:
    """Scores by task and arm; .5 where nothing is said; seeds a hundredth apart."""
    return Results(
        result(f"{task}_{arm}", seed, means.get(f"{task}_{arm}", 0.5) + 0.01 * seed)
        for task in TASKS
        for arm in ARMS
        for seed in SEEDS
    )


def decisions(results: Results) -> dict[str, str]:
    return {each.claim: each.decision for each in STUDY.conclude(results).verdicts}


WINS = {"products_shallow": 0.2, "induction_shallow": 0.3}


def test_what_planted_results_decide() -> None:
    found = planted(**WINS, facts_deep=0.9)
    assert decisions(found) == {
        "six-layers-of-one": "holds",
        "quality-of-kl-layers": "in part",
        "by-more-loops": "holds",
        "wins-and-losses": "holds",
    }
    assert decisions(planted(**WINS))["quality-of-kl-layers"] == "holds"
    assert decisions(planted(**WINS))["wins-and-losses"] == "in part"
    behind = planted(facts_deep=0.9, products_deep=0.9, induction_deep=0.9)
    assert decisions(behind)["six-layers-of-one"] == "fails"
    assert decisions(behind)["quality-of-kl-layers"] == "fails"
    assert decisions(behind)["by-more-loops"] == "no result"
    one = planted(products_shallow=0.2, induction_shallow=0.5)
    assert decisions(one)["by-more-loops"] == "in part"
    worse = planted(products_shallow=0.9, induction_shallow=0.9)
    assert decisions(worse)["by-more-loops"] == "fails"
    assert set(decisions(Results()).values()) == {"no result"}


def test_the_table_at_equal_training_accuracy() -> None:
    tables = STUDY.conclude(planted(products_loop=0.6)).tables
    (table,) = (t for t in tables if "equal training accuracy" in t.title)
    assert [row[:3] for row in table.rows] == [
        [task, f"{level:g}", arm] for task in TASKS for level in LEVELS[task] for arm in ARMS
    ]
    row = next(row for row in table.rows if row[0] == "products")
    per_token = counts.training_flops(model_config("loop", "products"), context_length=8)
    tera = 110 * BATCH["products"] * 16 * per_token / 1e12
    assert row[3:] == ["3 of 3", "110", f"{tera:.2f}", "0.610", "longer: 0.305"]
    assert table.rows[-1][3:] == ["0 of 3", "", "", "", ""]


def test_what_a_run_stores(tmp_path: Path) -> None:
    settings = {"steps": 2, "examples": 8, "rate": 0.01}
    found = train_and_measure("shallow", "products", 0, settings, False, tmp_path / "a")
    assert [step for step, _ in found["by_step"]] == [2]
    assert found["equal_accuracy"].keys() == {"0.3", "0.5"}
    assert found["beyond"].keys() == {"24 factors", "32 factors"}
    for level, early in found["equal_accuracy"].items():
        assert (early is not None) == (found["by_step"][0][1] >= float(level))
    tuning = train_and_measure("shallow", "products", 0, settings, True, tmp_path / "b")
    assert {**tuning, "by_step": 0, "equal_accuracy": 0} == {
        **found, "by_step": 0, "equal_accuracy": 0,
    }  # fmt: skip


def test_the_figure_is_drawn() -> None:
    conclusion = STUDY.conclude(planted(**WINS, facts_deep=0.9))
    rows = conclusion.figures["wins_and_losses"]
    assert {(row["task"], row["against"]) for row in rows} == {
        (task, other) for task in TASKS for other in ("shallow", "deep")
    }
    assert set(STUDY.draw(conclusion)) == {"wins_and_losses"}


def test_every_arm_is_tuned_alike_and_then_run_on_three_seeds() -> None:
    runs = list(STUDY.runs("small", Results()))
    assert len(runs) == 9 * 3 and all(run.tuning and run.seed == TUNING_SEED for run in runs)
    done = Results(
        Result(run, {"accuracy": 1 - abs(run.settings["rate"] - RATES[1])}, None, 1, 1, "", "")
        for run in runs
    )
    later = STUDY.runs("small", done)
    assert len(later) == 9 * 6
    assert {run.settings["rate"] for run in later if not run.tuning} == {RATES[1]}
