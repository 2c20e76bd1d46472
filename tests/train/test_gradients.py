"""Gradients in parts, on fake ranks. ``test_two_ranks.py`` has those of real ones."""

from typing import Any

import pytest
import torch

from openmythos.config.counts import total_params
from openmythos.train.dry_run import fake_rank
from openmythos.train.gradients import hold_gradients, reshard, scale_gradients, square_sum, units
from openmythos.train.ranks import join
from openmythos.train.setup import _laid_out
from tests.strategies import random_model, small_config, unchecked
from tests.train.ranks_shard import MOE, POISSON, Arm

LAYOUTS: dict[str, dict[str, Any]] = {
    "shards": {"dp_shard": 4},
    "copies": {"dp_replicate": 2, "dp_shard": 2},
    "tensor": {"dp_shard": 2, "tp": 2},
    "experts": {"dp_shard": 4, "ep": 2},
    "both": {"dp_shard": 2, "ep": 2, "tp": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_over_all_ranks_each_gradient_counts_once(layout: str) -> None:
    arm, total = Arm(MOE, {"depth": POISSON}, LAYOUTS[layout]), 0.0
    for rank in range(4):
        with unchecked(), fake_rank(rank, 4):
            recipe = arm.recipe()
            ranks = join(recipe.parallel)
            model = _laid_out(arm.config(), recipe, ranks)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            scale_gradients(model, 3.0)
            total += square_sum(model, ranks).item()
    assert total == 9 * total_params(arm.config())


def test_one_process_has_no_units() -> None:
    model = random_model(small_config())
    assert list(units(model)) == []
    reshard(model)
    hold_gradients(model)
    (model.embed.weight.sum() * 2).backward()
    scale_gradients(model, 0.5)
    assert torch.equal(model.embed.weight.grad, torch.ones_like(model.embed.weight))
