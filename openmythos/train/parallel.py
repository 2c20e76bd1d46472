"""Training over many devices: this process's place among the ranks, and the model's layout.

The engine is PyTorch's: one mesh of devices, and FSDP2 with a unit per block. One process that
``torchrun`` did not start has no process group and no mesh; nothing changes for it.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from openmythos.config.parallel import ParallelConfig
from openmythos.model.recurrent import RecurrentDepthLM

AXES = ("dp_replicate", "efsdp", "ep", "tp")


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
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None
    row_rank: int = 0
    num_row_ranks: int = 1

    @staticmethod
    def alone(device: torch.device | str = "cpu") -> "Ranks":
        """One process without a process group."""
        return Ranks(0, 1, torch.device(device))

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def counts(self) -> bool:
        """Whether a sum over all ranks counts this one: of ranks with the same rows, one does."""
        return self.mesh is None or self.mesh["tp"].get_local_rank() == 0

    def sum(self, numbers: Shaped[Tensor, "*N"]) -> Shaped[Tensor, "*N"]:
        """The sum over all ranks, each set of rows counted once; ``numbers`` itself if alone."""
        if self.mesh is None:
            return numbers
        total = numbers.clone() if self.counts else torch.zeros_like(numbers)
        dist.all_reduce(total)
        return total

    def each(self, make: Callable[[], Any]) -> list[Any]:
        """What ``make`` returns on every rank, in their order; all call it and wait for all.

        It must be plain data: it is sent as JSON.

        Raises:
            OSError: ``make`` raised it, on this rank or on another.
        """
        error, said = None, {}
        try:
            said = {"made": make()}
        except OSError as raised:
            error, said = raised, {"failed": str(raised)}
        answers = [said] if self.mesh is None else _gathered(said)
        if error is not None:
            raise error
        failed = [answer["failed"] for answer in answers if "failed" in answer]
        if failed:
            raise OSError(failed[0])
        return [answer["made"] for answer in answers]

    def on_first(self, make: Callable[[], Any]) -> Any:
        """As ``each``, but only the first rank calls ``make``, and all get what it returns."""
        return self.each(lambda: make() if self.first else None)[0]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.mesh is not None:
            dist.barrier()


def _gathered(said: Any) -> list[Any]:
    """What every rank says; never pickled."""
    text = torch.frombuffer(bytearray(json.dumps(said), "utf-8"), dtype=torch.uint8)
    lengths = [torch.tensor(0) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor(len(text)))
    longest = max(map(int, lengths))
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, torch.cat((text, text.new_zeros(longest - len(text)))))
    pairs = zip(texts, lengths, strict=True)
    return [json.loads(bytes(each[: int(length)].tolist())) for each, length in pairs]


def join(config: ParallelConfig, device: torch.device | str = "cpu") -> Ranks:
    """Find this process's place: that of ``torchrun``, or of the process group that exists.

    Raises:
        ValueError: The number of processes is not the layout's.
    """
    started = dist.is_available() and (dist.is_initialized() or "RANK" in os.environ)
    if started and not dist.is_initialized():
        dist.init_process_group(init_method="env://")
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
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    shard = config.dp_shard // config.ep
    mesh = init_device_mesh(
        place.type, (config.dp_replicate, shard, config.ep, config.tp), mesh_dim_names=AXES
    )
    mesh["efsdp", "ep"]._flatten("dp_shard")
    rank = dist.get_rank()
    return Ranks(rank, world, place, mesh, rank // config.tp, config.num_row_ranks)


def parallelize(model: RecurrentDepthLM, config: Any, ranks: Ranks) -> None:
    """Lay the model out over the ranks; nothing changes for one process alone.

    In this order: tensor parallel, expert parallel, compilation by block, FSDP2.

    Args:
        model: The model.
        config: The run's ``TrainConfig``.
        ranks: This process's place.
    """
    if ranks.mesh is None:
        return
