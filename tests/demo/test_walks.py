import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.demo import walks as demo_hops
from openmythos.demo.walks import exit_loops, hops_config, measure_hops, rank_correlation
from openmythos.model.exit import ArgmaxStableExit, Fixed
from openmythos.train.recipe import HopsData
from tests.strategies import random_model
from tests.train import examples
from tests.train.examples import changed, tiny_model


def test_act_2_is_walks_for_so_many_seconds() -> None:
    config = hops_config(7, 12.0)
    assert isinstance(config.data, HopsData)
    assert config.train.max_seconds == 12.0 and config.train.max_steps is None
    assert config.train.seed == 7


def test_rank_correlation() -> None:
    assert rank_correlation([(1, 10), (2, 20), (3, 21)]) == pytest.approx(1.0)
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1.0)
    assert rank_correlation([(1, 5), (2, 5), (3, 5)]) is None
    # By hand, ties at their mean rank: (1, 2.5, 2.5, 4) against (1, 2, 3, 4).
    assert rank_correlation([(1, 1), (2, 2), (2, 3), (3, 4)]) == pytest.approx(0.9487, abs=1e-4)


def test_exit_loops_of_every_walk() -> None:
    walks = Walks(HopsConfig(num_entities=4, num_relations=2, max_train_hops=2))
    model = random_model(tiny_model())
    loops, right = exit_loops(model, walks, 3, Fixed())
    assert loops == [max(demo_hops.LOOPS)] * demo_hops.NUM_WALKS
    assert len(right) == demo_hops.NUM_WALKS and 0 <= sum(right) < 0.5 * len(right)
    stable, _ = exit_loops(model, walks, 3, ArgmaxStableExit(patience=1))
    assert min(stable) >= 2 and sum(stable) < sum(loops)


def test_measuring_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_hops, "NUM_WALKS", 16)
    monkeypatch.setattr(demo_hops, "HOPS", (1, 3, 5))
    monkeypatch.setattr(demo_hops, "LOOPS", (1, 4))
    examples.run(changed(examples.hops_config(), max_steps=4), tmp_path)
    made = examples.set_up(changed(examples.hops_config(), max_steps=4), tmp_path)
    before = torch.get_rng_state()
    result = measure_hops(made.model, made.task.puzzle, tmp_path, Fixed())
    assert torch.equal(before, torch.get_rng_state())
    assert [len(row) for row in result.accuracy] == [2, 2, 2]
    assert result.exit_loops == [4.0, 4.0, 4.0] and result.rank_correlation is None
    assert result.stage_curve == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert result.steps == 4
    file = io.StringIO()
    demo_hops.show_hops(Console(file=file, width=100), result)
    assert "the same everywhere" in file.getvalue()
