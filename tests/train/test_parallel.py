"""One process alone: no process group and no mesh. ``test_ranks.py`` has the cases of several."""

import pytest
import torch
import torch.distributed as dist

from openmythos.config.parallel import ParallelConfig
from openmythos.train.parallel import Ranks, join


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
