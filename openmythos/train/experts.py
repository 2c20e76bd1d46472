"""Expert parallelism: each rank of a group holds some experts, and tokens travel to them.

The experts lie in their block's FSDP unit, on a mesh of their own: ``Shard(0)`` over the group's
ranks, so that each holds whole experts, and ``Shard(1)`` over the other ranks, which see other
tokens.

Source: Lepikhin et al. 2020, GShard (arXiv 2006.16668), section 3; without its capacity limit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_common import (  # private until it is exported
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional

from openmythos.model.context import ForwardContext
from openmythos.model.feedforward import MoE
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.moe import Gather, LoopedExperts, Spread, moe_experts, sorted_pairs
from openmythos.train.ranks import EXPERT_SHARD
from openmythos.train.tensor import become, copied, summed


class DistributedExperts:
    """All routed experts, of which each rank of a group holds some, as one function.

    Where ranks hold the same tokens (``tensor``), each sends its share of them.
    """

    def __init__(
        self, experts: Callable[..., Tensor], group: dist.ProcessGroup, tensor: DeviceMesh | None
    ) -> None:
        self._experts, self._group, self._tensor = experts, group, tensor

    def __call__(
        self,
        x: Float[Tensor, "N D"],
        expert: Int[Tensor, "N K"],
        weight: Float[Tensor, "N K"],
        counts: Int[Tensor, "E"],
    ) -> Float[Tensor, "N D"]:
        """As ``ops.moe.moe_experts``; all ranks of the group call it together."""
        if self._tensor is None:
            return self._exchange(x, expert, weight, counts)
        same, num_tokens = self._tensor.get_group(), len(x)
        bounds = [num_tokens * i // self._tensor.size() for i in range(self._tensor.size() + 1)]
        start, stop = bounds[self._tensor.get_local_rank() :][:2]
        mine = slice(start, stop)
        counts = torch.bincount(expert[mine].flatten(), minlength=len(counts))
        x, weight = copied(x, same), copied(weight, same)
        y = self._exchange(x[mine], expert[mine], weight[mine], counts)
        return summed(functional.pad(y, (0, 0, start, num_tokens - stop)), same)

    def _exchange(self, x: Tensor, expert: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Send each pair's token to the rank of its expert, and take the results back."""
        if torch.is_autocast_enabled(x.device.type):  # less to send
            x = x.to(torch.get_autocast_dtype(x.device.type))
        num_ranks = dist.get_world_size(self._group)
        order, token, _ = sorted_pairs(expert, counts)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        place = place.view(expert.shape)
        sent = counts.view(num_ranks, -1)  # rank r holds the r-th block of the experts
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        to_them, from_them = sent.sum(dim=1).tolist(), received.sum(dim=1).tolist()
        rows = Spread.apply(x, token, place)
        rows = all_to_all_single_autograd(rows, from_them, to_them, self._group)
        # They come by rank, and from each rank by expert.
        local = torch.arange(received.shape[1], device=x.device).repeat(num_ranks)
        local = local.repeat_interleave(received.flatten())[:, None]
        ones = torch.ones(local.shape, dtype=x.dtype, device=x.device)
        y = self._experts(rows, local, ones, received.sum(dim=0))
        y = all_to_all_single_autograd(y, to_them, from_them, self._group)
        y = y * weight.flatten()[order, None].to(y.dtype)
        result: Tensor = Gather.apply(y, token, place)
        return result


class ExpertParallel(MoE):
    """A mixture of experts of which this rank holds some, as DTensors."""

    group: dist.ProcessGroup
    tensor: DeviceMesh | None

    def experts(self, ctx: ForwardContext | None) -> Callable[..., Tensor]:
        """All experts; the loops of a forward share them."""
        given = None if ctx is None else ctx.experts
        if ctx is None or given is not None:
            return self._distributed(self.gate_up, self.down, given=given)
        made: Callable[..., Tensor] = ctx.once(self._distributed, self.gate_up, self.down)
        return made

    def _distributed(
        self, *weights: Tensor, given: Callable[..., Tensor] | None = None
    ) -> DistributedExperts:
        gate_up, down = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
        if given is None and gate_up.device.type == "cpu":
            experts: Callable[..., Tensor] = LoopedExperts(gate_up, down)
        else:
            experts = partial(given or moe_experts, gate_up=gate_up, down=down)
        return DistributedExperts(experts, self.group, self.tensor)


def divide_experts(model: RecurrentDepthLM, mesh: DeviceMesh) -> None:
    """Divide every layer's routed experts over the axis ``ep`` of a mesh."""
    axis, tensor = mesh["ep"], mesh["tp"]
    if axis.size() == 1:
        return
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        for name in ("gate_up", "down"):
            whole = getattr(layer, name)
            part = distribute_tensor(whole.data, axis, [Shard(0)], src_data_rank=None)
            setattr(layer, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        same = tensor if tensor.size() > 1 else None
        become(layer, ExpertParallel, group=axis.get_group(), tensor=same)


def expert_placement(mesh: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """FSDP's ``shard_placement_fn`` for blocks: experts on their own mesh, all else by default.

    Only parameters that ``divide_experts`` divided are experts'. They are sharded over all ranks
    that hold the same experts and see other tokens, also those along ``tp``.
    """
    info: FSDPMeshInfo = FSDPMeshInfo(mesh[EXPERT_SHARD], shard_mesh_dim=0)
    if mesh["dp_replicate"].size() > 1:
        both = mesh["dp_replicate", EXPERT_SHARD]
        info = HSDPMeshInfo(both, shard_mesh_dim=1, replicate_mesh_dim=0)

    def place(parameter: nn.Parameter) -> ShardPlacementResult | None:
        experts = isinstance(parameter, DTensor) and parameter.device_mesh == mesh["ep"]
        return ShardPlacementResult(Shard(1), info) if experts else None

    return place
