"""Starts N gloo processes on this machine and runs many cases in them: a launch takes seconds.

A case is a function without arguments at the top level of a module. Every process calls it; it asks
``torch.distributed`` for its rank, joins with a layout of its own (``train.parallel.join``), and
raises where something is wrong. What it returns must be plain data that JSON can hold.

The first rank that raises ends the launch, because the others may wait for it for ever; the cases
after it are tried in a launch of their own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Case = Callable[[], Any]
SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of a case: each rank's result, or the error of the rank that failed first."""

    results: tuple[Any, ...] = ()
    error: str | None = None


def launch(world: int, cases: Sequence[Case], seconds: float = SECONDS) -> dict[str, Outcome]:
    """Run the cases on ``world`` ranks, in order; their outcomes by name.

    Args:
        world: Number of processes.
        cases: Functions at the top level of modules.
        seconds: After this time all processes are killed, and the running case has failed.
    """
    found: dict[str, Outcome] = {}
    left = list(cases)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            done = _launch(world, left, Path(folder), seconds)
        found |= done
        left = [case for case in left if name_of(case) not in found]
    return found


def name_of(case: Case) -> str:
    """The case's name, by which another process finds it."""
    return f"{case.__module__}:{case.__qualname__}"


def _launch(world: int, cases: Sequence[Case], folder: Path, seconds: float) -> dict[str, Outcome]:
    """One launch: the outcomes of the cases up to the first that failed, at least of one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    names = [name_of(case) for case in cases]
    processes = []
    for rank in range(world):
        place = [str(folder), str(rank), str(world)]
        with (folder / f"stderr-{rank}").open("w") as stderr:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.train.launch", *place, *names],
                    cwd=Path(__file__).parents[2],
                    env=environment,
                    stderr=stderr,
                )
            )
    end = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                time.sleep(0.5)  # the others notice that their partner has gone
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outcomes: dict[str, Outcome] = {}
    for number, name in enumerate(names):
        files = [folder / f"{number}-{rank}.json" for rank in range(world)]
        if all(file.exists() for file in files):
            outcomes[name] = Outcome(tuple(json.loads(file.read_text()) for file in files))
            continue
        errors = sorted(folder.glob(f"{number}-*.error"), key=lambda file: file.stat().st_mtime_ns)
        said = errors[0].read_text() if errors else _last_words(folder, world, seconds)
        outcomes[name] = Outcome(error=f"{errors[0].stem if errors else name}: {said}")
        break
    return outcomes


def _last_words(folder: Path, world: int, seconds: float) -> str:
    """What the processes printed, where none of them has said what was wrong."""
    said = [(folder / f"stderr-{rank}").read_text()[-2000:] for rank in range(world)]
    return f"no end within {seconds:.0f} s, or a process died\n" + "\n".join(said)


def _run(folder: Path, rank: int, world: int, names: Sequence[str]) -> None:
    """One process of a launch."""
    import importlib
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    for number, name in enumerate(names):
        module, function = name.split(":")
        try:
            torch.manual_seed(0)
            result = getattr(importlib.import_module(module), function)()
            torch.set_default_dtype(torch.float32)
            dist.barrier()
        except BaseException:
            (folder / f"{number}-{rank}.error").write_text(traceback.format_exc())
            os._exit(1)
        (folder / f"{number}-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # a group's threads can hold a process that is done


if __name__ == "__main__":
    _run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
