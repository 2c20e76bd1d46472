"""Tensor parallelism: each rank of a group holds some heads and hidden channels of every block.

Between a block's layers all ranks of the group hold the whole state. A first layer (of queries, of
gate and up) takes the whole input and computes its own output channels; a second layer (``out``,
``down``) takes these and computes a part of a sum, which one all-reduce completes. The modules
compute on local tensors: a parameter is a DTensor, and reading it gives this rank's part.

Source: Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053), section 3.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from openmythos.model.attention import GQA, MLA, Attention
from openmythos.model.feedforward import FeedForward, MoE, ReLUSquared, SwiGLU
from openmythos.model.loop_signal import LoopLinear
from openmythos.model.recurrent import RecurrentDepthLM


class _Copied(torch.autograd.Function):
    """The same on every rank; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Summed(torch.autograd.Function):
    """The sum over the ranks, each of which has the whole gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copied(x: Float[Tensor, "..."], group: dist.ProcessGroup) -> Float[Tensor, "..."]:
    """x, which all ranks of the group hold, where each goes on with a part of the work."""
    y: Tensor = _Copied.apply(x, group)
    return y


def summed(x: Float[Tensor, "..."], group: dist.ProcessGroup) -> Float[Tensor, "..."]:
    """The sum of the ranks' parts, where all go on with the same work."""
    y: Tensor = _Summed.apply(x, group)
    return y


# --- modules on local tensors ----------------------------------------------------------------


class Local(nn.Module):
    """A module whose parameters are DTensors, and which reads them as this rank's part.

    That is while FSDP has gathered them: then they lie on the axis ``tp`` alone. Where every rank
    reads the whole parameter, each has a part of its gradient.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if not isinstance(value, DTensor) or value.device_mesh.mesh_dim_names != ("tp",):
            return value
        parts = [Partial() if p.is_replicate() else p for p in value.placements]
        return value.to_local(grad_placements=parts)


class First(Local):
    """A layer of which each rank computes its own output channels, from the same input."""

    group: dist.ProcessGroup

    def forward(self, x: Float[Tensor, "..."], *others: Any, **named: Any) -> Any:
        """As of the whole layer, for this rank's channels."""
        return super().forward(copied(x, self.group), *others, **named)


class Second(Local):
    """A layer of which each rank has some of the input channels; the ranks' outputs are summed."""

    group: dist.ProcessGroup

    def forward(self, x: Float[Tensor, "..."], *others: Any) -> Float[Tensor, "..."]:
        """As of the whole layer."""
        return summed(super().forward(x, *others), self.group)


_JOINED: dict[tuple[Any, Any], Any] = {}  # the classes that ``become`` has made


def become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Make a module one of ``kind``, too, with these attributes; it keeps all that it has."""
    both = kind, type(module)
    if both not in _JOINED:
        _JOINED[both] = type("".join(each.__name__ for each in both), both, {})
    module.__class__ = _JOINED[both]
    for name, value in attributes.items():
        setattr(module, name, value)


# --- which part each rank holds ----------------------------------------------------------------


def order_of(parts: Sequence[int], num_ranks: int) -> Int[Tensor, "R"]:
    """The rows of a fused matrix in the order in which the ranks hold them.

    Each part (gate, up; queries, keys, values) is divided by itself: a rank holds its rows of the
    first part, then of the second and so on.
    """
    rows = torch.arange(sum(parts)).split(list(parts))
    chunks = [part.chunk(num_ranks) for part in rows]
    return torch.cat([chunk[rank] for rank in range(num_ranks) for chunk in chunks])


class _Divider:
    """Divides the parameters of a model over the ranks of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.size, self.group = mesh, mesh.size(), mesh.get_group()

    def put(self, module: nn.Module, name: str, dim: int | None, parts: Sequence[int] = ()) -> None:
        """Replace a parameter by this rank's part along ``dim``; None: all of it."""
        whole: Tensor = module._parameters[name]  # type: ignore[assignment]
        if dim is None:
            made = DTensor.from_local(whole.data, self.mesh, [Replicate()], run_check=False)
        else:
            parts = parts or (whole.shape[dim],)
            mine = order_of(parts, self.size).chunk(self.size)[self.mesh.get_local_rank()]
            if len(parts) > 1:
                orders = getattr(module, "orders", {})
                module.orders = {**orders, name: (dim, order_of(parts, self.size))}  # type: ignore[assignment]
            local = whole.data.index_select(dim, mine.to(whole.device))
            made = DTensor.from_local(
                local,
                self.mesh,
                [Shard(dim)],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        setattr(module, name, nn.Parameter(made, requires_grad=whole.requires_grad))

    def first(self, layer: nn.Module, parts: Sequence[int] = ()) -> None:
        """Divide a layer's output channels; ``parts`` are the fused matrices."""
        self.put(layer, "weight", 0, parts)
        if getattr(layer, "lora", None) is not None:
            self.put(layer, "lora_down", None)
            self.put(layer, "lora_up", 1, parts)
        become(layer, First, group=self.group)

    def second(self, layer: LoopLinear) -> None:
        """Divide a layer's input channels."""
        self.put(layer, "weight", 1)
        if layer.lora is not None:
            self.put(layer, "lora_down", 2)
            self.put(layer, "lora_up", None)
        become(layer, Second, group=self.group)

    def gqa(self, layer: GQA) -> None:
        """Divide the heads: each rank has groups of query heads with their key and value head."""
        part = layer.config
        heads, kv_heads = part.num_heads, part.num_kv_heads
        self.first(layer.qkv, [n * part.head_dim for n in (heads, kv_heads, kv_heads)])
        self.second(layer.out)
        if part.qk_bias:
            self.put(layer, "qk_bias", 0, (heads, kv_heads))
        if part.qk_norm == "weighted":
            self.put(layer, "q_norm_weight", None)
            self.put(layer, "k_norm_weight", None)
        if layer.value_table is not None:
            self.put(layer.value_table, "weight", 1)
            become(layer.value_table, Local)
            self.first(layer.value_gate)
        become(layer, Local)

    def mla(self, layer: MLA) -> None:
        """Divide the heads. All share the latents and the rotary key, whose gradients are summed.

        These are the inputs of the up-projections, so that ``First`` sums them.
        """
        self.first(layer.q_up)
        self.first(layer.kv_up)
        self.second(layer.out)

    def swiglu(self, layer: SwiGLU) -> None:
        """Divide gate and up alike."""
        width = layer.down.in_features
        self.first(layer.gate_up, (width, width))
        self.second(layer.down)

    def relu_squared(self, layer: ReLUSquared) -> None:
        """Divide the hidden channels."""
        self.first(layer.up)
        self.second(layer.down)

    def moe(self, layer: MoE) -> None:
        """Nothing: the routed experts are whole, and the shared one is a layer of its own."""


DIVISIONS: dict[type[nn.Module], Callable[[_Divider, Any], None]] = {
    GQA: _Divider.gqa,
    MLA: _Divider.mla,
    SwiGLU: _Divider.swiglu,
    ReLUSquared: _Divider.relu_squared,
    MoE: _Divider.moe,
}


def divide_tensors(model: RecurrentDepthLM, mesh: DeviceMesh) -> None:
    """Divide the blocks' matrices over the ranks of a mesh of one axis; see ``DIVISIONS``."""
    if mesh.size() == 1:
        return
    divider = _Divider(mesh)
    for module in list(model.modules()):
        if isinstance(module, Attention | FeedForward):
            DIVISIONS[type(module)](divider, module)
