"""What is trained, what the dial is, and the rules on planted results."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from experiments.another_graph.model import BASE_GRAPH, config_of, measure
from experiments.another_graph.picture import draw
from experiments.another_graph.run import SEEDS, STUDY
from experiments.another_graph.verdicts import dial, known
from experiments.depth_dial.grid import HOPS, LOOPS
from experiments.run_store import Result, Results, Run
from openmythos.demo.walks import hops_config
from openmythos.interop.loading import load_config
from tests.experiments.test_depth_dial import CHANCE, holds, steps

Accuracy = Callable[[int, int], float]


def planted(new: Mapping[str, Accuracy], old: float = CHANCE) -> Results:
    """Of each arm its accuracy on the new graph; on the old one, that of the trained ones."""
    found = Results()
    for run in STUDY.runs("small", Results()):
        on_new = new.get(run.arm, lambda hops, loops: CHANCE)
        on_old = holds(10) if run.arm == "before" else (lambda hops, loops: old)
        grids = {
            graph: {
                "loops": list(LOOPS),
                "accuracy": [
                    [of(hops, loops) + 0.002 * run.seed for loops in LOOPS] for hops in HOPS
                ],
            }
            for graph, of in (("new", on_new), ("old", on_old))
        }
        found.append(Result(run, {**grids, "leaks": {"chance": 0.0625}}, None, 1, 1, "", ""))
    return found


def test_rules_on_planted_results() -> None:
    kept = {"sampled": holds(10), "fixed": holds(10, 0.8), "fixed_longest": steps(10)}
    found = STUDY.conclude(planted(kept))
    assert [v.decision for v in found.verdicts] == ["holds"] * 4
    assert found.verdicts[1].number == pytest.approx(0.2)
    assert len(draw(found.figures["dial"]).axes) == 4
    same = dict.fromkeys(kept, holds(10, 0.9))
    found = STUDY.conclude(planted(same, old=0.5))
    assert [v.decision for v in found.verdicts] == ["fails"] * 4
    few = Results(r for r in planted(kept) if r.run.seed == SEEDS[0])
    assert {v.decision for v in STUDY.conclude(few).verdicts} == {"no result"}


def test_the_dial_counts_the_loops_at_which_a_held_answer_is_right() -> None:
    of = {r.run.arm: r.data for r in planted({"sampled": holds(8), "fixed": steps(8)})}
    small = 0.002 * SEEDS[-1]
    assert dial(of["sampled"], "new") == pytest.approx(1 + small) == known(of["sampled"], "new")
    one_cell = [1 / cells for cells in (16, 15, 14, 13)]
    expected = sum(one + (1 - one) * CHANCE for one in one_cell) / 4
    assert dial(of["fixed"], "new") == pytest.approx(expected + small)
    assert known(of["fixed"], "new") == pytest.approx(CHANCE + small)


def test_arms_differ_from_the_base_in_what_they_say() -> None:
    runs = {run.arm: run for run in STUDY.runs("small", Results()) if run.seed == SEEDS[0]}
    configs = {arm: config_of(run) for arm, run in runs.items() if arm != "before"}
    base = hops_config(BASE_GRAPH, 1.0)
    for arm, config in configs.items():
        assert config.model == load_config("zoo:walks")
        assert config.train.init_from == "zoo:walks" and config.train.seed == SEEDS[0]
        assert config.train.optimizer == base.train.optimizer
        assert config.data.mixed == (arm != "fixed_longest")
        assert (config.train.depth == base.train.depth) == (arm == "sampled")
    assert BASE_GRAPH not in SEEDS


@pytest.mark.slow
def test_a_run_begins_with_the_base(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = {"walks": 16, "most_loops": 8}
    before = measure(Run("before", 1, settings), tmp_path / "before")
    assert before["old"]["accuracy"][7][7] > 0.8 > 0.3 > before["new"]["accuracy"][7][7]
    one = Run("sampled", 1, {**settings, "steps": 1, "rate": 1e-9})
    same = measure(one, tmp_path / "one")
    assert same["old"]["accuracy"] == before["old"]["accuracy"]
