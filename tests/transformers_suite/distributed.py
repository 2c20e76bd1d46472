"""``run_distributed``, which transformers' distribution leaves out: a call on several processes.

Copied beside its tests under the name that they import.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# One process imports this for all ranks of all tests; they are forked from it.
PRELOADED = ["test_tensor_parallel_mixin", "test_expert_parallel_mixin"]


def _ranked(rank: int, world_size: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """``run_distributed(world_size=2)(function)(*arguments)`` calls ``function(rank, ...)``."""

    def decorate(function: Callable) -> Callable:
        def call(*arguments: Any) -> None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            multiprocessing.set_forkserver_preload([f"{__package__}.{name}" for name in PRELOADED])
            torch.multiprocessing.start_processes(
                _ranked,
                (world_size, port, function, arguments),
                nprocs=world_size,
                start_method="forkserver",
            )

        return call

    return decorate
