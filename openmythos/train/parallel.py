"""Training over many devices: this process's place among the ranks, and the model's layout.

The engine is PyTorch's: one mesh of devices, and FSDP2 with a unit per block. One process that
``torchrun`` did not start has no process group and no mesh; nothing changes for it.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from openmythos.config.parallel import ParallelConfig, started_rank
from openmythos.model.feedforward import Router
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.experts import EXPERT_SHARD, divide_experts, expert_placement
from openmythos.train.recipe import TrainConfig
from openmythos.train.shard import own_indices
from openmythos.train.tensor import divide_tensors, fused_orders

AXES = ("dp_replicate", "efsdp", "ep", "tp")
# Names of several axes together: those of dense weights, and those of one rank's experts.
JOINT_AXES = {"dp_shard": ("efsdp", "ep"), EXPERT_SHARD: ("efsdp", "tp")}
# A graph for one row and one for more, with and without gradients, per shape of a call: with a
# depth per sequence more than the 8 that torch allows.
COMPILING: dict[str, Any] = {
    "fullgraph": True,
    "recompile_limit": 64,
    "isolate_recompiles": True,
}


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together.

    Attributes:
        rank: This process, from 0.
        world: Number of processes.
        device: Its device.
        mesh: The mesh of all ranks, with the axes of ``AXES``; None on one process alone.
        row_rank: Which part of a batch's rows this process trains, from 0.
        num_row_ranks: Number of parts of a batch's rows.
        group: The group whose messages ``each`` sends; None: that of all other messages, too.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None
    row_rank: int = 0
    num_row_ranks: int = 1
    group: dist.ProcessGroup | None = None

    @staticmethod
    def alone(device: torch.device | str = "cpu") -> "Ranks":
        """One process without a process group."""
        return Ranks(0, 1, torch.device(device))

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def counts_rows(self) -> bool:
        """Whether a sum over rows counts this rank's: of ranks with the same rows, one does."""
        return self.mesh is None or self.mesh["tp"].get_local_rank() == 0

    def sum(self, numbers: Shaped[Tensor, "*N"]) -> Shaped[Tensor, "*N"]:
        """The sum over all ranks; ``numbers`` itself if alone."""
        if self.mesh is None:
            return numbers
        total = numbers.clone()
        dist.all_reduce(total)
        return total

    def sum_rows(self, numbers: Shaped[Tensor, "*N"]) -> Shaped[Tensor, "*N"]:
        """The sum over the ranks with different rows."""
        return self.sum(numbers if self.counts_rows else torch.zeros_like(numbers))

    def each(self, make: Callable[[], Any]) -> list[Any]:
        """What ``make`` returns on every rank, in their order; all call it and wait for all.

        It must be plain data: it is sent as JSON.

        Raises:
            OSError, ValueError: ``make`` raised it, on this rank or on another.
        """
        if self.mesh is None:
            return [make()]
        error, said = None, {}
        try:
            said = {"made": make()}
        except (OSError, ValueError) as raised:
            kind = "ValueError" if isinstance(raised, ValueError) else "OSError"
            error, said = raised, {kind: str(raised)}
        answers = _gathered(said, self.group)
        if error is not None:
            raise error
        for answer in answers:
            if "OSError" in answer:
                raise OSError(answer["OSError"])
            if "ValueError" in answer:
                raise ValueError(answer["ValueError"])
        return [answer["made"] for answer in answers]

    def on_first(self, make: Callable[[], Any]) -> Any:
        """As ``each``, but only the first rank calls ``make``, and all get what it returns."""
        return self.each(lambda: make() if self.first else None)[0]

    def apart(self) -> "Ranks":
        """The same place with a group of its own, for another thread; all ranks call it together.

        The messages of a group are told apart by their order only, and two threads have none.
        """
        if self.mesh is None:
            return self
        return replace(self, group=dist.new_group(backend="gloo"))

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.on_first(lambda: None)

    def leave(self) -> None:
        """End the process group, if this process is in one."""
        if self.mesh is not None:
            dist.destroy_process_group()


def _gathered(said: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank says; never pickled."""
    text = torch.frombuffer(bytearray(json.dumps(said), "utf-8"), dtype=torch.uint8)
    lengths = [torch.tensor(0) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor(len(text)), group)
    longest = max(map(int, lengths))
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, torch.cat((text, text.new_zeros(longest - len(text)))), group)
    pairs = zip(texts, lengths, strict=True)
    return [json.loads(bytes(each[: int(length)].tolist())) for each, length in pairs]


def join(config: ParallelConfig, device: torch.device | str = "cpu") -> Ranks:
    """Find this process's place: that of ``torchrun``, or of the process group that exists.

    Raises:
        ValueError: The number of processes is not the layout's.
    """
    place = torch.device(device)
    started = dist.is_available() and (dist.is_initialized() or started_rank() is not None)
    if started and not dist.is_initialized():
        # Two groups in one: what the host has to say needs no accelerator.
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, **_meeting_place())
    world = dist.get_world_size() if started else 1
    if world != config.num_ranks:
        layout = f"dp_replicate {config.dp_replicate} x dp_shard {config.dp_shard} x tp {config.tp}"
        raise ValueError(
            f"train.parallel lays the run out over {config.num_ranks} processes ({layout}), and "
            f"there are {world}: start it with torchrun --nproc-per-node {config.num_ranks}, or "
            "change train.parallel"
        )
    if not started:
        return Ranks.alone(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    sizes = (config.dp_replicate, config.dp_shard // config.ep, config.ep, config.tp)
    mesh = init_device_mesh(place.type, sizes, mesh_dim_names=AXES)
    for name, axes in JOINT_AXES.items():
        mesh[axes]._flatten(name)
    rank = dist.get_rank()
    return Ranks(rank, world, place, mesh, rank // config.tp, config.num_row_ranks)


def _meeting_place() -> dict[str, Any]:
    """Where processes that ``torchrun`` has started again meet; nothing: where they always do.

    Its store outlives the attempts (torch 2.13): ranks would read the addresses of dead ones there.
    Attempts are counted by machine, and so tell them apart only if there is one.
    """
    said = os.environ
    attempt = int(said.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or said.get("LOCAL_WORLD_SIZE") != said.get("WORLD_SIZE"):
        return {}
    store, rank, world = next(rendezvous("env://"))
    return {
        "store": PrefixStore(f"attempt-{attempt}", store),
        "rank": rank,
        "world_size": world,
    }


# --- the layout of a model -----------------------------------------------------------------------


def parallelize(model: RecurrentDepthLM, config: TrainConfig, ranks: Ranks) -> None:
    """Lay the model out over the ranks; nothing changes for one process alone.

    In this order: tensor parallel, expert parallel, compilation by block, FSDP2. Activation
    checkpointing is the loop's (``recompute``), inside which the units of FSDP2 lie.

    A unit is a block, the embedding or the head. With ``autocast`` their weights are gathered in
    that precision, except for the routers, which are units of their own: rounded router weights
    choose other experts. What is left is one unit in the weights' own precision: the norms outside
    the blocks, and the injection, whose decay is too close to 1 to be rounded.

    Unless the core is gathered in every loop, its blocks keep their weights from their first use in
    a step until ``reshard``. So does what is left, and the coda and the head if they read every
    loop. The embedding is gathered for the forward pass only: its gradient needs no weights.
    """
    if ranks.mesh is None:
        return
    layout = config.parallel
    layout.check(model.config)
    divide_tensors(model, ranks.mesh["tp"])
    divide_experts(model, ranks.mesh)
    if config.compile:
        for block in blocks(model):
            block.compile(**COMPILING)
    with warnings.catch_warnings(action="ignore"):  # of joint axes beside others
        place = expert_placement(ranks.mesh)
        axes = ("dp_replicate", "dp_shard") if layout.dp_replicate > 1 else ("dp_shard",)
        mesh = ranks.mesh[axes]
    own = MixedPrecisionPolicy()
    policy = own
    if config.autocast == "bfloat16":
        # The inputs are not cast: the state stays in the precision of the weights outside.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    kept: list[FSDPModule] = []

    def unit(module: nn.Module, keep: bool, precision: MixedPrecisionPolicy) -> FSDPModule:
        made: FSDPModule = fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=not keep,
            shard_placement_fn=place,
            mp_policy=precision,
        )
        if keep:
            kept.append(made)
        return made

    by_step, every_loop = layout.core_gather == "step", config.objective.needs_states
    keeps = {id(block): by_step for block in model.core}
    keeps |= {id(block): by_step and every_loop for block in model.coda}
    for block in blocks(model):
        keep = keeps.get(id(block), False)
        if policy is not own:
            for module in block.modules():
                if isinstance(module, Router):
                    unit(module, keep, own)
        unit(block, keep, policy)
    if model.halting is not None:  # an objective calls it outside the model's forward
        unit(model.halting.proj, True, own)
    # What the head has gathered in the forward pass is used next in its backward pass.
    head = model.embed if model.head is None else model.head
    last = unit(head, every_loop, policy)
    last.set_reshard_after_forward(False, recurse=False)
    first = last if head is model.embed else unit(model.embed, False, policy)
    first.set_unshard_in_backward(False)
    model.embed.activations = model.embed.weight.dtype
    unit(model, True, own)
    for held in kept:
        held.set_reshard_after_backward(False, recurse=False)
        # By default it would gather what ran before it, here the prelude, ahead of its own backward
        # pass; but not where its first loops have no gradient, and so not on every rank at the same
        # time: they would wait for each other for ever.
        held.set_modules_to_backward_prefetch([held])
    for each in units(model):
        # Losses are divided by the number of targets of the whole batch, so gradients are summed.
        each.set_gradient_divide_factor(1.0)
        each.set_force_sum_reduction_for_comms(True)


def blocks(model: RecurrentDepthLM) -> list[nn.Module]:
    """All blocks, in the order of a forward."""
    return [*model.prelude, *model.core, *model.coda]


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """The units of FSDP2; none on one process alone."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def reshard(model: nn.Module) -> None:
    """Free the gathered weights; until then gradients and optimisers miss the kept units."""
    for module in units(model):
        module.reshard()


def hold_gradients(model: nn.Module) -> None:
    """Let the next backward passes keep their whole gradients, without summing them over ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)


def release_gradients(model: nn.Module) -> None:
    """Sum what was held over the ranks, once.

    Not in the last backward pass itself: a block that loops ends a pass in every loop, and would
    first sum what the passes before have left, and then the rest.
    """
    for module in units(model):
        module.set_requires_gradient_sync(True, recurse=False)
        # Not public in torch 2.13: what the engine calls at the end of a backward pass.
        for group in module._get_fsdp_state()._fsdp_param_groups:
            group.post_backward()
            group.finalize_backward()


Part = tuple[Shaped[Tensor, "R C"], Int[Tensor, "R"], Any]  # values, rows, an index of columns


def own_parts(model: nn.Module) -> Callable[[str, Tensor], Part]:
    """Of a parameter by its name, this rank's part as a matrix, and which part of the whole it is.

    The whole counts as a matrix: its last dimension by all others. Writing to the part writes to
    the parameter.
    """
    orders = fused_orders(model)

    def own_part(name: str, parameter: Tensor) -> Part:
        others = parameter.shape[:-1]
        rows = torch.arange(others.numel()).view(others)
        if not isinstance(parameter, DTensor):
            return parameter.view(-1, parameter.shape[-1]), rows.flatten(), slice(None)
        indices = own_indices(parameter, orders.get(name))
        for axis, index in enumerate(indices[:-1]):
            rows = rows.index_select(axis, index)
        return (
            parameter.to_local().view(rows.numel(), len(indices[-1])),
            rows.flatten(),
            indices[-1],
        )

    return own_part


def local_gradients(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Every gradient with this rank's part of it."""
    for parameter in model.parameters():
        grad = parameter.grad
        if grad is not None:
            yield grad, grad.to_local() if isinstance(grad, DTensor) else grad


@torch.no_grad()
def square_sum(model: nn.Module, ranks: Ranks) -> Float[Tensor, ""]:
    """This rank's share of the sum of all squared gradients: over all ranks, each counts once."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for grad, part in local_gradients(model):
        if _counts(grad, ranks):
            total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
    return total


def _counts(grad: Tensor, ranks: Ranks) -> bool:
    """Whether this rank is the first of those that hold the same part of a gradient."""
    assert ranks.mesh is not None
    split: set[str] = set()
    if isinstance(grad, DTensor):
        for name, placement in zip(
            grad.device_mesh.mesh_dim_names or (), grad.placements, strict=True
        ):
            if not placement.is_replicate():
                split.update(JOINT_AXES.get(name, (name,)))
    coordinate = ranks.mesh.get_coordinate() or ()  # slicing a mesh by axis takes far longer
    return not any(at for axis, at in zip(AXES, coordinate, strict=True) if axis not in split)


@torch.no_grad()
def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply all gradients, each rank its own part."""
    for _, part in local_gradients(model):
        part.mul_(factor)
