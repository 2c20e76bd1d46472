from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.chain_of_thought import run as study
from experiments.chain_of_thought.answer import in_writing, record, silently
from experiments.chain_of_thought.arm import ARMS, LOOP, SILENT, STACK, SUMS, WALKS
from experiments.chain_of_thought.conclude import (
    MOST_LOOPS,
    VERDICTS,
    equal_loops,
    hops_per_loop,
    named,
    reach,
)
from experiments.chain_of_thought.run import HOPS, SIZES, STUDY
from experiments.run_store import Result, Results, Run
from openmythos.config import counts
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.engine.reference import generate
from openmythos.train.validation import puzzle_right
from tests.strategies import random_model, small_config

WRITTEN = Walks(HopsConfig(num_entities=2, num_relations=2, max_train_hops=3, written_out=True))
ASKED = Walks(HopsConfig(num_entities=2, num_relations=2, max_train_hops=3))
SHAPE: dict[str, Any] = {"vocab_size": 4, "num_coda_layers": 0}


# --- answers --------------------------------------------------------------------------------------


def test_a_model_reads_what_it_has_written() -> None:
    """Without positions decoding is the same; a whole chain is right where every target is."""
    model = random_model(small_config(**SHAPE, rope=None))
    chains = in_writing(model, WRITTEN, hops=3, count=32, seed=1, loops=2)
    questions = WRITTEN.held_out_batch(3, 32, seed=1).tokens[:, :4]
    assert chains.tolist() == generate(model, questions, max_new_tokens=3, num_loops=2).tokens
    passed = torch.from_numpy(ASKED.entities_along(questions.numpy()))[:, 1:]
    whole = (chains == passed).all(dim=1)
    assert torch.equal(whole, puzzle_right(model, WRITTEN, 3, 2, 32, 1))


def test_an_entity_stands_at_the_position_of_its_relation() -> None:
    """A model with positions writes what it was trained to, not what plain decoding would."""
    model = random_model(small_config(**SHAPE))
    chains = in_writing(model, WRITTEN, hops=4, count=64, seed=1, loops=2)
    batch = WRITTEN.held_out_batch(4, 64, seed=1)
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3]
    whole = (chains == batch.targets[:, 4:]).all(dim=1)
    assert torch.equal(whole, puzzle_right(model, WRITTEN, 4, 2, 64, 1))


def test_silent_answers_after_every_loop() -> None:
    model = random_model(small_config(**SHAPE))
    said = silently(model, ASKED, hops=3, count=20, seed=1, most=5)
    tokens = ASKED.held_out_batch(3, 20, seed=1).tokens
    for loops in (1, 3, 5):
        expected = model(tokens, num_loops=loops).logits[:, -1].argmax(dim=-1)
        assert torch.equal(said[loops - 1], expected)


def test_what_a_run_stores() -> None:
    silent = record(random_model(small_config(**SHAPE)), ASKED, (1, 3), count=16, most=4)
    assert len(silent["right"]["3"]) == 4 and silent["leaks"]["3"]["chance"] == 0.5
    assert np.shape(silent["names"]) == (4, 3)
    assert [row[-1] for row in silent["names"]] == silent["right"]["3"]
    writes = record(random_model(small_config(**SHAPE)), WRITTEN, (1, 3), count=16, most=4)
    assert writes["right"]["1"] == [writes["whole"]["1"]]
    assert writes["right"]["3"][0] >= writes["whole"]["3"]


# --- FLOPs ----------------------------------------------------------------------------------------


def test_flops_count_every_token() -> None:
    assert [arm.num_tokens(8) for arm in WALKS] == [9, 16, 16]
    by_hand = sum(
        counts.forward_flops(LOOP.model, num_loops=2, context_length=n, cached=True)
        for n in range(1, 17)
    )
    assert LOOP.test_flops(8, 2) == by_hand
    for hops in (4, 8, 12, 16):
        near = abs(SILENT.test_flops(hops, equal_loops(hops)) / STACK.test_flops(hops, 1) - 1)
        one_more = SILENT.test_flops(hops, 2) - SILENT.test_flops(hops, 1)
        assert near <= 0.51 * one_more / STACK.test_flops(hops, 1)
    for arm in WALKS:
        assert abs(arm.training_flops(8) / STACK.training_flops(8) - 1) < 0.15
    parameters = [counts.total_params(arm.model) for arm in WALKS]
    assert parameters[0] == parameters[2] < parameters[1]


# --- verdicts -------------------------------------------------------------------------------------


def silent_outcome(
    *, per_loop: float = 2.0, most_hops: int = 12, names: float = 0.0
) -> dict[str, Any]:
    """A model that does ``per_loop`` hops in a loop, up to ``most_hops``."""
    right = {
        str(n): [
            float(n <= most_hops and loop * per_loop >= n) for loop in range(1, MOST_LOOPS + 1)
        ]
        for n in HOPS
    }
    rows = [[names * (round(loop * per_loop) == n) for n in range(1, 9)] for loop in range(1, 17)]
    return {"right": right, "names": rows, "leaks": leaks(), "learnt": 1.0, **early(right)}


def writing_outcome(most_hops: int) -> dict[str, Any]:
    right = {str(n): [float(n <= most_hops)] for n in HOPS}
    whole = {n: share[0] for n, share in right.items()}
    found = {"right": right, "whole": whole, "leaks": leaks(), "learnt": 1.0}
    return {**found, "equal_accuracy": None}


def early(right: dict[str, list[float]]) -> dict[str, Any]:
    """A checkpoint on the way that answers half as much."""
    half = {n: [share / 2 for share in row] for n, row in right.items()}
    return {"equal_accuracy": {"step": 450, "right": half}}


def leaks() -> dict[str, Any]:
    return {str(n): {"chance": 1 / 16} for n in HOPS}


def results(outcomes: dict[str, dict[str, Any]]) -> Results:
    """Three equal seeds of each arm."""
    return Results(
        Result(Run(arm, seed, {"rate": 1.0}), data, None, 1.0, 1.0, "a processor", "2")
        for arm, data in outcomes.items()
        for seed in (0, 1, 2)
    )


def decided(claim: str, **outcomes: dict[str, Any]) -> str:
    return VERDICTS[claim](STUDY.claims[claim], results(outcomes)).decision


def test_numbers_by_hand() -> None:
    two = silent_outcome(per_loop=2.0, names=0.9)
    # 1 and 2 hops after one loop, 3 and 4 after two ...: the slope is that of 1.5, 3.5, 5.5, 7.5.
    assert hops_per_loop(two, 0.9) == pytest.approx(2.0)
    assert hops_per_loop(silent_outcome(per_loop=1.0), 0.9) == pytest.approx(1.0)
    assert hops_per_loop(silent_outcome(most_hops=2), 0.9) is None
    assert named(two, 2.0) == pytest.approx(0.9) and named(two, 1.0) < 0.5
    assert reach(two, 0.9) == 12 and reach(writing_outcome(7), 0.9) == 7


def test_a_loop_is_a_step() -> None:
    def verdict(per_loop: float, names: float, silent: int, written: int) -> str:
        return decided(
            "a-loop-is-a-step-of-thought",
            silent=silent_outcome(per_loop=per_loop, most_hops=silent, names=names),
            stack_writes=writing_outcome(written),
        )

    assert verdict(1.0, 0.8, silent=10, written=12) == "holds"
    assert verdict(2.0, 0.8, silent=10, written=12) == "holds"
    assert verdict(2.0, 0.1, silent=10, written=12) == "in part"
    assert verdict(0.5, 0.8, silent=8, written=16) == "in part"
    assert verdict(0.5, 0.1, silent=8, written=16) == "fails"
    assert verdict(2.0, 0.1, silent=2, written=16) == "no result"
    assert decided("a-loop-is-a-step-of-thought") == "no result"


def test_writing_wins_on_arithmetic() -> None:
    name = "writing-wins-on-arithmetic"
    good, short = writing_outcome(16), writing_outcome(4)
    assert (
        decided(name, silent_sums=silent_outcome(most_hops=10), stack_writes_sums=good) == "holds"
    )
    assert (
        decided(name, silent_sums=silent_outcome(most_hops=16), stack_writes_sums=good) == "fails"
    )
    assert decided(name, silent_sums=silent_outcome(), stack_writes_sums=short) == "fails"
    assert decided(name, silent_sums=silent_outcome()) == "no result"


def test_writing_goes_further() -> None:
    name = "writing-goes-further"
    written = writing_outcome(16)
    assert decided(name, silent=silent_outcome(most_hops=10), stack_writes=written) == "holds"
    # It would get there, but not with the loops that equal FLOPs allow.
    assert decided(name, silent=silent_outcome(most_hops=16), stack_writes=written) == "in part"
    fast = silent_outcome(most_hops=16, per_loop=8.0)
    assert decided(name, silent=fast, stack_writes=written) == "fails"
    seeds = results({"silent": silent_outcome(), "stack_writes": written})
    seeds[0] = Result(seeds[0].run, silent_outcome(most_hops=16), None, 1.0, 1.0, "cpu", "2")
    assert VERDICTS[name](STUDY.claims[name], seeds).decision == "no result"


# --- the study ------------------------------------------------------------------------------------


def test_arms_are_runs_of_their_own() -> None:
    assert len({str(arm.settings(10, 8)) for arm in ARMS.values()}) == len(ARMS) == 5
    for arm in ARMS.values():
        config = arm.config(seed=4, rate=0.5, steps=7)
        assert (config.train.seed, config.train.max_steps) == (4, 7)
        assert config.model.num_core_layers == arm.layers
        assert (config.data.written_out, config.data.shifts) == (arm.writes, arm in SUMS)  # type: ignore[union-attr]
    first = STUDY.runs("small", Results())
    assert len(first) == 3 * len(ARMS) and all(run.tuning for run in first)


def test_the_table_at_equal_training_accuracy() -> None:
    planting = {"silent": silent_outcome(per_loop=2.0), "stack_writes": writing_outcome(10)}
    tables = STUDY.conclude(results(planting)).tables
    (table,) = (t for t in tables if "equal training accuracy" in t.title)
    silent, stack = table.rows
    assert silent[:5] == [ARMS["silent"].in_words, "3 of 3", "450", "50%", "50%"]
    assert stack == [ARMS["stack_writes"].in_words, "0 of 3", "", *[""] * len(HOPS)]


def test_runs_of_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "smoke", (1, 2))
    monkeypatch.setattr(study, "MOST_LOOPS", 3)
    done = {}
    for run in STUDY.runs("smoke", Results()):
        if run.arm in ("silent", "stack_writes"):
            done[run.arm] = dict(STUDY.measure(run, "smoke", tmp_path / run.arm))
            assert 0 <= done[run.arm]["learnt"] <= 1
    conclusion = STUDY.conclude(results(done))
    assert [verdict.claim for verdict in conclusion.verdicts] == list(STUDY.claims)
    assert STUDY.draw(conclusion).keys() == conclusion.figures.keys()
