"""This process's place among those that train together.

One process that ``torchrun`` did not start has no process group and no mesh; nothing changes for
it.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from openmythos.config.parallel import ParallelConfig, started_rank

EXPERT_SHARD = "efsdp_tp"  # the axes ``efsdp`` and ``tp`` of a mesh together
AXES = ("dp_replicate", "efsdp", "ep", "tp")
# Names of several axes together: those of dense weights, and those of one rank's experts.
JOINT_AXES = {"dp_shard": ("efsdp", "ep"), EXPERT_SHARD: ("efsdp", "tp")}


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
