"""One process as one of fake ranks. ``test_two_ranks.py`` has the cases of several."""

import subprocess
import sys
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos.train import loop
from openmythos.train.dry_run import fake_rank
from openmythos.train.ranks import join
from tests.strategies import unchecked
from tests.train.ranks_shard import BATCH, Arm, Rows, make

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


def order_of(depths: list[int]) -> list[tuple[str, int]]:
    """The exchanges of the first of two ranks, whose rows have these depths, two with gradients."""
    with unchecked(), fake_rank(0, 2):
        recipe = Arm(layout={"dp_shard": 2}).recipe()
        ranks = join(recipe.parallel)
        model = make(Arm().config(), recipe, ranks).train()
        batch = next(Rows(ranks).batches(0, BATCH))
        with Order() as order:
            loop._backward(
                model, batch, torch.zeros(4, 12).long(), torch.tensor(depths), 2, 1, recipe
            )
        return order.found


def test_ranks_with_other_depths_exchange_in_the_same_order() -> None:
    """Loops without gradients are no reason to gather earlier or later: ranks would hang."""
    expected = order_of([2, 1, 2, 2])
    assert len(expected) == 14 and order_of([6, 2, 1, 3]) == expected
    with patch.object(FSDPModule, "set_modules_to_backward_prefetch"):
        assert order_of([6, 2, 1, 3]) != order_of([2, 1, 2, 2])
