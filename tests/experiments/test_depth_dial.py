from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.claim import Verdict
from experiments.depth_dial.arms import ARMS, STACKS, config_of, model_of, sizes
from experiments.depth_dial.grid import (
    EXIT_HOPS,
    HOPS,
    LOOPS,
    MOST_CONFIDENT,
    RULES,
    loops_taken,
    path,
    twice,
)
from experiments.depth_dial.run import RATES, STUDY
from experiments.depth_dial.verdicts import conclude
from experiments.run_store import Result, Results, Run
from openmythos.config import counts
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.model.exit import ArgmaxStableExit
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.validation import puzzle_right
from tests.strategies import random_model
from tests.train.examples import small_walks, tiny_model

Accuracy = Callable[[int, int], float]  # of hops and loops
CHANCE = 0.06


def steps(far: int) -> Accuracy:
    """Right at exactly one loop per two hops, up to so many hops."""
    return lambda hops, loops: 1.0 if loops == -(-hops // 2) and hops <= far else CHANCE


def holds(far: int, good: float = 1.0) -> Accuracy:
    """Right from one loop per two hops on."""
    return lambda hops, loops: good if loops >= -(-hops // 2) and hops <= far else CHANCE


def up_to(far: int) -> Accuracy:
    return lambda hops, loops: 1.0 if hops <= far else CHANCE


PLANTED: Mapping[str, Accuracy] = {
    "fixed_longest": steps(12),
    "fixed_mixed": holds(10),
    "sampled_longest": holds(10),
    "sampled_mixed": holds(9),
    "every_loop": holds(8),
    "on_the_way": holds(32),
    "rope": steps(10),
    "drawn_positions": steps(16),
    "stack_parameters": up_to(4),
    "stack_training": up_to(8),
    "stack_test": up_to(8),
    "stack_long": up_to(8),
    "stack_parameters_rope": up_to(4),
    "stack_training_rope": up_to(8),
}
EXPECTED = {
    "keeps-going": "in part",
    "vanilla-collapses": "holds",
    "degrades": "in part",
    "near-ceiling": "in part",
    "jumps-around": "fails",
    "exits-prevent": "in part",
    "dial": "holds",
    "more-loops": "holds",
    "spare-loops": "holds",
    "sampled-dial": "fails",
    "ends-at": "holds",
    "positions": "holds",
    "on-the-way": "holds",
    "shortcuts": "holds",
    "stack-twice": "holds",
    "like-for-like": "no result",
}


ALL_STEP = {arm: steps(12) for arm in PLANTED if "mixed" in arm or "sampled" in arm}


def planted(changed: Mapping[str, Accuracy] = {}, seeds: int = 5, **data: Any) -> Results:
    found = Results()
    for arm, accuracy in {**PLANTED, **changed}.items():
        loops = (1,) if arm in STACKS else LOOPS
        for seed in range(seeds):
            jitter = 0.002 * (seed % 3 - 1)
            rows = [[accuracy(hops, n) - 0.01 + jitter for n in loops] for hops in HOPS]
            grid = {"loops": list(loops), "accuracy": rows, "log_prob": rows}
            # Rules lose nothing where too many loops do no harm; elsewhere nearly all.
            kept = 0.99 if arm in ("fixed_mixed", "sampled_longest", "sampled_mixed") else 0.1
            exits = {
                rule: {"accuracy": [kept] * len(EXIT_HOPS), "loops": [4.0] * len(EXIT_HOPS)}
                for rule in (*RULES, MOST_CONFIDENT)
            }
            one = {
                **grid, "equal_accuracy": {"step": 600, **grid}, "exits": exits,
                "falls": {"share": 0.1, "mean": 0.1, "loops": 4, "answered": 1.0},
                "twice": [accuracy(hops // 2, 1) - 0.01 for hops in HOPS],
                "leaks": {"chance": 0.0625}, "progress": 7.9,
            }  # fmt: skip
            run = Run(arm, seed, {"rate": 0.003})
            found.append(Result(run, {**one, **data}, None, 1.0, 1.0, "p", "t"))
    return found


def verdicts(results: Results) -> dict[str, Verdict]:
    return {v.claim: v for v in conclude(STUDY.claims, results).verdicts}


def test_every_rule_on_planted_results() -> None:
    found = verdicts(planted())
    assert {name: v.decision for name, v in found.items()} == {**EXPECTED, "exits-prevent": "fails"}
    assert found["ends-at"].number == 12 and found["keeps-going"].number == pytest.approx(
        0.05, abs=0.01
    )
    assert "0.99 of 10 hops (5 loops)" in found["keeps-going"].sentence
    assert {v.decision for v in verdicts(planted(seeds=2)).values()} == {"no result"}
    conclusion = conclude(STUDY.claims, planted())
    assert {table.title[:8] for table in conclusion.tables} >= {"Accuracy", "What exi", "Arms, an"}
    assert set(STUDY.draw(conclusion)) == set(conclusion.figures)


@pytest.mark.parametrize(
    ("changed", "claim", "decision"),
    [
        ({"fixed_longest": steps(16)}, "keeps-going", "holds"),
        ({"stack_long": up_to(12), "stack_training": up_to(12)}, "keeps-going", "fails"),
        ({"stack_long": up_to(10), "stack_training": up_to(10)}, "vanilla-collapses", "no result"),
        (ALL_STEP, "degrades", "holds"),
        ({"fixed_longest": holds(12)}, "degrades", "fails"),
        ({"fixed_longest": holds(12)}, "near-ceiling", "holds"),
        ({"fixed_longest": holds(12)}, "exits-prevent", "not decidable here"),
        (ALL_STEP, "dial", "in part"),
        ({"stack_parameters": up_to(8)}, "more-loops", "fails"),
        ({"fixed_longest": steps(10)}, "spare-loops", "in part"),
        ({"fixed_longest": holds(10)}, "spare-loops", "fails"),
        ({"fixed_mixed": holds(9), "sampled_mixed": holds(10)}, "sampled-dial", "holds"),
        ({"fixed_longest": steps(10)}, "ends-at", "in part"),
        ({"every_loop": holds(16)}, "ends-at", "fails"),
        ({"drawn_positions": steps(12)}, "positions", "fails"),
        ({"drawn_positions": steps(6)}, "positions", "not decidable here"),
        ({"on_the_way": holds(14)}, "on-the-way", "fails"),
        ({"fixed_longest": steps(10), "on_the_way": holds(14)}, "on-the-way", "in part"),
        ({"every_loop": holds(10)}, "shortcuts", "no result"),
        ({"rope": steps(12)}, "like-for-like", "holds"),
        ({"stack_training_rope": up_to(12)}, "like-for-like", "fails"),
        ({"stack_training_rope": up_to(12)}, "keeps-going", "fails"),
        ({"stack_parameters_rope": up_to(8)}, "more-loops", "fails"),
        ({arm: up_to(6) for arm in STACKS}, "stack-twice", "not decidable here"),
        ({"fixed_longest": steps(16), "stack_long": up_to(7), "stack_test": up_to(7),
          "stack_training_rope": up_to(7),
          "stack_training": lambda hops, loops: 0.95 if hops <= 8 else CHANCE}, "stack-twice",
         "in part"),
    ],
)  # fmt: skip
def test_verdicts_flip(changed: Mapping[str, Accuracy], claim: str, decision: str) -> None:
    assert verdicts(planted(changed))[claim].decision == decision


def test_a_lost_arm_costs_only_the_verdicts_that_read_it() -> None:
    def without(*arms: str) -> dict[str, Verdict]:
        return verdicts(Results(r for r in planted() if r.run.arm not in arms or r.run.seed < 2))

    known = {name: v.decision for name, v in verdicts(planted()).items()}
    assert {name: v.decision for name, v in without("stack_long").items()} == known
    found = without("drawn_positions")
    assert found["positions"].sentence == "Fewer than 3 seeds of drawn_positions."
    assert [name for name, v in found.items() if v.decision != known[name]] == ["positions"]
    assert without(*STACKS)["keeps-going"].decision == "no result"


def test_jumps_and_runs_that_never_reach_equal_accuracy() -> None:
    jumps = {"falls": {"share": 0.8, "mean": 2.0, "loops": 4, "answered": 1.0}}
    assert verdicts(planted(**jumps))["jumps-around"].decision == "holds"
    late = verdicts(planted(equal_accuracy=None))["vanilla-collapses"]
    assert late.decision == "not decidable here" and "Only 0 runs" in late.sentence


def test_arms_match() -> None:
    assert counts.total_params(model_of(ARMS["fixed_longest"])) == 104_192
    found = {name: size.config.num_core_layers for name, size in sizes().items() if "stack" in name}
    assert list(found.values()) == [2, 8, 16, 8, 2, 8, 8]
    assert all((model_of(arm).rope is not None) == arm.rope for arm in ARMS.values())
    run = Run("on_the_way", 3, {"steps": 1200, "rate": 0.003})
    config = config_of(run)
    assert config.train.optimizer.muon_lr == 0.003 and config.train.optimizer.lr == 0.002
    assert config.data.passed_targets and config.data.check_loops == 4 and not config.data.mixed
    assert config.train.seed == 3 and config.model.num_loops == 4
    sampled = config_of(replace(run, arm="sampled_mixed"))
    assert sampled.train.depth.per_sequence and sampled.data.mixed and sampled.model.num_loops == 8
    assert config_of(replace(run, arm="drawn_positions")).data.position_range == 64


def test_every_loop_is_read_out_as_a_forward_would() -> None:
    walks = small_walks()
    model = random_model(tiny_model())
    batch = walks.held_out_batch(4, 32, seed=1)
    one = path(model, batch, 5)
    for loops in (1, 3, 5):
        right = puzzle_right(model, walks, 4, loops, 32, seed=1)
        assert torch.equal(one.right[loops - 1], right)
    taken = loops_taken(ArgmaxStableExit(patience=1), one)
    tokens = one.logits.argmax(dim=-1)
    for walk in range(32):
        same = [n for n in range(2, 6) if tokens[n - 1, walk] == tokens[n - 2, walk]]
        assert int(taken[walk]) == min(same, default=5)


def test_two_passes_go_on_from_the_answer() -> None:
    walks = Walks(HopsConfig(seed=1))

    class Oracle(RecurrentDepthLM):
        """Answers up to eight hops."""

        def forward(self, tokens: torch.Tensor, **options: Any) -> Any:
            reached = torch.from_numpy(walks.entities_along(tokens.numpy()))
            if tokens.shape[1] > 9:
                reached = (reached + 1) % 16
            return SimpleNamespace(logits=torch.nn.functional.one_hot(reached).double())

    model = Oracle(tiny_model())
    found = dict(zip(HOPS, twice(model, walks, 16), strict=True))
    assert all(found[hops] == 1.0 for hops in range(2, 17)) and found[20] < 1


def test_smoke_runs_are_measured(tmp_path: Path) -> None:
    runs = [run for run in STUDY.runs("smoke", Results()) if run.arm == "on_the_way"]
    found = Results()
    for run in runs:
        data = STUDY.measure(run, "smoke", tmp_path / run.name)
        assert len(list((tmp_path / run.name / "model" / "checkpoints").glob("step-*"))) == 1
        again = STUDY.measure(run, "smoke", tmp_path / run.name)  # a kill before it was stored
        assert again == data
        found.append(Result(run, data, None, 1.0, 1.0, "p", "t"))
    conclusion = STUDY.conclude(found)
    assert {v.decision for v in conclusion.verdicts} == {"no result"}
    assert len(found[0].data["accuracy"]) == len(HOPS)
    assert set(found[0].data["leaks"].values()) == {0.0625}


def test_every_arm_is_tuned_by_itself_before_its_seeds() -> None:
    first = STUDY.runs("small", Results())
    assert all(run.tuning for run in first) and len(first) == 3 * len(ARMS)
    scores = [{"progress": float(run.settings["rate"] == RATES[1])} for run in first]
    ended = zip(first, scores, strict=True)
    done = Results(Result(run, score, None, 1.0, 1.0, "p", "t") for run, score in ended)
    runs = STUDY.runs("small", done)
    assert len([run for run in runs if not run.tuning]) == 5 * len(ARMS)
    assert {run.settings["rate"] for run in runs if not run.tuning} == {RATES[1]}
