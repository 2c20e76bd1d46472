"""Expert parallelism in a group of one; ``ranks_expert`` has larger ones."""

import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
from torch.distributed.tensor import Shard, distribute_tensor

from openmythos.ops.moe import LoopedExperts
from openmythos.train.experts import (
    EXPERT_SHARD,
    DistributedExperts,
    expert_placement,
)
from tests.strategies import seeded


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/x", rank=0, world_size=1)
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_sent_and_brought_back_is_as_computed_here(
    dtype: torch.dtype, num_tokens: int, group: dist.ProcessGroup
) -> None:
    """With gradients; in fp32 by our kernel, where there is one."""
    generator = seeded()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    weights = random(4, 64, 32), random(4, 32, 32)
    x, share = random(num_tokens, 32), random(num_tokens, 2)
    expert = torch.rand(num_tokens, 4, generator=generator).topk(2).indices
    counts, grad = expert.flatten().bincount(minlength=4), random(num_tokens, 32)
    found = []
    for sends in (False, True):
        inputs = [t.clone().requires_grad_() for t in (x, share, *weights)]
        experts = LoopedExperts(*inputs[2:])
        call = DistributedExperts(experts, group, None) if sends else experts
        y = call(inputs[0], expert, inputs[1], counts)
        y.backward(grad)
        found.append([y.detach(), *(t.grad for t in inputs)])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Slicing a flattened dim")  # as this mesh is made
def test_only_experts_have_a_place_of_their_own(group: dist.ProcessGroup) -> None:
    """The class of a result is private in PyTorch: this fails where it is another."""
    mesh = init_device_mesh("cpu", (1,) * 4, mesh_dim_names=("dp_replicate", "efsdp", "ep", "tp"))
    shard = mesh["efsdp", "tp"]._flatten(EXPERT_SHARD)
    place = expert_placement(mesh)
    whole = torch.zeros(4, 2, 2)
    assert place(torch.nn.Parameter(whole)) is None
    assert place(torch.nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)]))) is None
    found = place(torch.nn.Parameter(distribute_tensor(whole, mesh["ep"], [Shard(0)])))
    assert isinstance(found, ShardPlacementResult)
    assert found.placement == Shard(1) and found.mesh_info.mesh == shard
