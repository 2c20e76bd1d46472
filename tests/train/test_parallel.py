"""One process: alone, or as one of fake ranks. ``test_ranks.py`` has the cases of several."""

import subprocess
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos.config.parallel import ParallelConfig
from openmythos.train import loop, ranks
from openmythos.train.dry_run import fake_rank
from openmythos.train.ranks import Ranks, join
from tests.strategies import unchecked
from tests.train.ranks_shard import BATCH, Arm, Rows, make


def test_one_process_is_alone() -> None:
    ranks = join(ParallelConfig())
    assert ranks == Ranks.alone() and ranks.first and ranks.mesh is None
    assert not dist.is_initialized()
    numbers = torch.ones(3)
    assert ranks.sum(numbers) is numbers
    ranks.wait()


def test_a_layout_needs_its_processes() -> None:
    with pytest.raises(ValueError, match="there are 1: start it with torchrun"):
        join(ParallelConfig(dp_shard=2))


def test_ranks_that_are_started_again_meet_apart_from_the_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ranks._meeting_place() == {}
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "RANK": 0}
    elastic = {"TORCHELASTIC_RESTART_COUNT": 2, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in {**place, **elastic, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert ranks._meeting_place() == {}  # several machines count their own attempts
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = ranks._meeting_place()
    found.pop("store").set("where", "here")
    assert found == {"rank": 0, "world_size": 2} and store.get("attempt-2/where") == b"here"


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
