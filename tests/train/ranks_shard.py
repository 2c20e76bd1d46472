"""Cases for two ranks and more: data parallel training and FSDP2."""

import pytest
import torch
import torch.distributed as dist

from openmythos.config.parallel import ParallelConfig
from openmythos.train.parallel import join


def every_rank_has_its_place() -> None:
    world = dist.get_world_size()
    ranks = join(ParallelConfig(dp_shard=world))
    assert (ranks.rank, ranks.world) == (dist.get_rank(), world)
    assert (ranks.row_rank, ranks.num_row_ranks) == (ranks.rank, world)
    total = ranks.sum(torch.tensor([1.0, ranks.rank]))
    assert total.tolist() == [world, world * (world - 1) / 2]
    with pytest.raises(ValueError, match=f"torchrun --nproc-per-node {2 * world}"):
        join(ParallelConfig(dp_shard=2 * world))


CASES = [every_rank_has_its_place]
