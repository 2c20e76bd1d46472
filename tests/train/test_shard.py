"""Which part each rank holds, by the layouts that FSDP makes; no rank but this one exists."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from openmythos.train.shard import divisions, own_indices
from openmythos.train.tensor import order_of


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Two by three ranks, seen from the last."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=6)
    yield init_device_mesh("cpu", (2, 3), mesh_dim_names=("dp_shard", "tp"))
    dist.destroy_process_group()


def sharded(mesh: DeviceMesh, shape: tuple[int, ...], dim: int | None) -> DTensor:
    """A parameter that tensor parallelism has divided along ``dim``, and then FSDP by rows."""
    layer, whole = nn.Module(), torch.zeros(shape)
    local = whole if dim is None else whole.chunk(3, dim)[0].contiguous()
    place = Replicate() if dim is None else Shard(dim)
    layer.weight = nn.Parameter(
        DTensor.from_local(
            local, mesh["tp"], [place], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    )
    fully_shard(layer, mesh=mesh["dp_shard"])
    assert isinstance(layer.weight, DTensor)
    return layer.weight


@pytest.mark.parametrize(
    ("shape", "dim", "held"),
    [
        ((12, 4), 0, [[10, 11], [0, 1, 2, 3]]),
        ((6, 6), 1, [[3, 4, 5], [4, 5]]),
        ((5, 2), None, [[3, 4], [0, 1]]),
        ((3, 2), 0, [[], [0, 1]]),
    ],
)
def test_parts_are_those_that_the_rank_holds(
    shape: tuple[int, ...],
    dim: int | None,
    held: list[list[int]],
    mesh: DeviceMesh,
) -> None:
    parameter = sharded(mesh, shape, dim)
    indices = own_indices(parameter)
    assert [index.tolist() for index in indices] == held
    assert tuple(map(len, indices)) == tuple(parameter.to_local().shape)
    assert [each.axis for each in divisions(parameter)] == ([0] if dim is None else [1, 0])


def test_a_fused_matrix_has_its_own_order(mesh: DeviceMesh) -> None:
    order = order_of((9, 3), 3)
    rows, _ = own_indices(sharded(mesh, (12, 4), 0), (0, order))
    assert rows.tolist() == [8, 11]
