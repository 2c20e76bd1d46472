"""One process as one of fake ranks. ``test_two_ranks.py`` has the cases of several."""

import subprocess
import sys
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos.config import (
    LearnedLoopConfig,
    UniversalACTConfig,
    WeightLoRAConfig,
)
from openmythos.train import loop
from openmythos.train.dry_run import fake_rank
from openmythos.train.objective import (
    ExitGainObjective,
    ExitWeightedObjective,
    FinalLoopObjective,
)
from openmythos.train.ranks import join
from tests.strategies import unchecked
from tests.train.ranks_shard import ARMS, BATCH, GATE, Arm, Rows, make

LOADED = """
import sys
import openmythos.train.run
many = {"torch.distributed.fsdp", "torch.distributed.tensor"}
print(sorted(many & set(sys.modules)))
"""


def test_what_a_run_needs_on_many_devices_is_loaded_there_only() -> None:
    """It takes a second or two, for which a wrong option would wait, too."""
    command = [sys.executable, "-c", LOADED]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout == "[]\n", ran.stderr


class Order(TorchDispatchMode):
    """The exchanges inside, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace == "c10d":
            self.found.append((func.name(), args[1].numel()))
        return func(*args, **(kwargs or {}))


def order_of(arm: Arm, depths: list[int], grad_loops: int | None = None) -> list[tuple[str, int]]:
    """The exchanges of the first of two ranks, whose rows have these depths."""
    with unchecked(), fake_rank(0, 2):
        recipe = replace(arm, layout={"dp_shard": 2}).recipe()
        ranks = join(recipe.parallel)
        model = make(arm.config(), recipe, ranks).train()
        batch, seeds = next(Rows(ranks).batches(0, BATCH)), torch.zeros(4, 12).long()
        with Order() as order:
            loop._backward(model, batch, seeds, torch.tensor(depths), grad_loops, 1, recipe)
        return order.found


def test_ranks_with_other_depths_exchange_in_the_same_order() -> None:
    """Loops without gradients are no reason to gather earlier or later: ranks would hang."""
    expected = order_of(Arm(), [2, 1, 2, 2], 2)
    assert len(expected) == 14 and order_of(Arm(), [6, 2, 1, 3], 2) == expected
    with patch.object(FSDPModule, "set_modules_to_backward_prefetch"):
        assert order_of(Arm(), [6, 2, 1, 3], 2) != order_of(Arm(), [2, 1, 2, 2], 2)


PLAIN = [name for name, arm in ARMS.items() if not (arm.layout or "adapter" in arm.train)]
OTHER_DEPTHS = {name: ARMS[name] for name in PLAIN if name != "accumulation"} | {
    "universal act": Arm(
        {"halting": UniversalACTConfig()}, {"objective": FinalLoopObjective(ponder_weight=0.01)}
    ),
    "next gain": Arm(GATE, {"objective": ExitGainObjective(label="next")}),
    "entropy": Arm(GATE, {"objective": ExitWeightedObjective(entropy_weight=0.1)}),
    "loop signals": Arm(
        {
            "loop_embedding": LearnedLoopConfig(num_loops=6),
            "loop_adapter": WeightLoRAConfig(rank=2, num_loops=6),
        }
    ),
}


@pytest.mark.parametrize("name", OTHER_DEPTHS)
@pytest.mark.parametrize("grad_loops", [None, 1])
def test_ranks_whose_rows_run_one_loop_exchange_as_the_others(
    name: str, grad_loops: int | None
) -> None:
    """A weight without a gradient there would not be summed, and the others would wait for it."""
    arm = OTHER_DEPTHS[name]
    assert order_of(arm, [1, 1, 1, 1], grad_loops) == order_of(arm, [6, 2, 1, 3], grad_loops)
