"""Starts N gloo processes on this machine and runs many cases in them: a launch takes seconds.

A case is a function at the top level of a module, without arguments or, as ``partial``, with one
string. Every process calls it; it asks ``torch.distributed`` for its rank, joins with a layout of
its own (``train.ranks.join``), and raises where something is wrong. What it returns must be
plain data that JSON can hold.

One process imports everything and forks the ranks: imports take as long as many cases do. The
first rank that raises ends the launch, because the others may wait for it for ever; the cases after
it are tried in a launch of their own.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

Case = Callable[[], Any]
SECONDS = 300.0


@dataclass(frozen=True)
class Outcome:
    """What became of a case: each rank's result, or the error of the rank that failed first."""

    results: tuple[Any, ...] = ()
    error: str | None = None


def launch(world: int, cases: Sequence[Case], seconds: float = SECONDS) -> dict[str, Outcome]:
    """Run the cases on ``world`` ranks, in order; the outcomes by name of those that it has.

    Args:
        world: Number of processes.
        cases: Functions at the top level of modules.
        seconds: After this time all processes are killed, and the running case has failed.
    """
    return dict(launch_each(world, cases, seconds))


def launch_each(
    world: int, cases: Sequence[Case], seconds: float = SECONDS, at_once: int | None = None
) -> Iterator[tuple[str, Outcome]]:
    """As ``launch``: the name and the outcome of each case as soon as it has ended.

    With ``at_once``, a launch has so many cases. gloo has a thread for each of all the groups that
    cases make, which wakes up a hundred times per second as long as its process lives: after twenty
    cases on four ranks they keep two cores from anything else.
    """
    left = [name_of(case) for case in cases if world in getattr(case, "ranks", (world,))]
    while left:
        with tempfile.TemporaryDirectory() as folder:
            for name, outcome in _launch(world, tuple(left[:at_once]), Path(folder), seconds):
                left.remove(name)
                yield name, outcome


def on_ranks(*numbers: int) -> Callable[[Case], Case]:
    """A case for so many ranks only; on others it is left out."""

    def mark(case: Case) -> Case:
        case.ranks = numbers  # type: ignore[attr-defined]
        return case

    return mark


def name_of(case: Case) -> str:
    """The case's name, by which another process finds it."""
    function, *given = (case.func, *case.args) if isinstance(case, partial) else (case,)
    return ":".join((function.__module__, function.__qualname__, *given))


def _launch(
    world: int, names: Sequence[str], folder: Path, seconds: float
) -> Iterator[tuple[str, Outcome]]:
    """One launch: the outcomes of the cases up to the first that failed, at least of one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.launch", str(folder), str(world), *names],
            cwd=Path(__file__).parents[2],
            env=environment,
            stderr=stderr,
            process_group=0,  # killed with its ranks; a session would get less of busy processors
        )
    end, running = time.monotonic() + seconds, True
    try:
        for number, name in enumerate(names):
            files = [folder / f"{number}-{rank}.json" for rank in range(world)]
            while running and not all(file.exists() for file in files):
                time.sleep(0.02)
                running = process.poll() is None and time.monotonic() < end
            if not all(file.exists() for file in files):
                break
            yield name, Outcome(tuple(json.loads(file.read_text()) for file in files))
        else:
            return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also the ranks, which it has started
        process.wait()
    errors = sorted(folder.glob(f"{number}-*.error"), key=lambda file: file.stat().st_mtime_ns)
    said = errors[0].read_text() if errors else _last_words(folder, seconds)
    yield name, Outcome(error=f"{errors[0].stem if errors else name}: {said}")


def _last_words(folder: Path, seconds: float) -> str:
    """What the processes printed, where none of them has said what was wrong."""
    said = (folder / "stderr").read_text()[-4000:]
    return f"no end within {seconds:.0f} s, or a process died\n{said}"


def _lead(folder: Path, world: int, names: Sequence[str]) -> int:
    """Start the ranks and wait for them; the first failure, or the launcher's end, ends all."""
    import torch
    import torch._dynamo  # many a case needs it

    launcher = os.getppid()
    torch.set_num_threads(1)
    cases = [_case(name) for name in names]
    gc.freeze()  # what was imported is never garbage
    ranks = []
    for rank in range(world):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            _run(folder, rank, world, cases)
    failed = False
    while ranks and not failed and os.getppid() == launcher:
        pid, status = os.waitpid(-1, os.WNOHANG)
        failed = status != 0
        if pid:
            ranks.remove(pid)
        else:
            time.sleep(0.02)
    if failed:
        time.sleep(0.5)  # the others notice that their partner has gone
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    return int(failed)


def _case(name: str) -> Case:
    module, function, *given = name.split(":")
    return partial(getattr(importlib.import_module(module), function), *given)


def _run(folder: Path, rank: int, world: int, cases: Sequence[Case]) -> NoReturn:
    """One rank of a launch."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    for number, case in enumerate(cases):
        try:
            torch.manual_seed(0)
            result = case()
            torch.set_default_dtype(torch.float32)
            dist.barrier()
        except BaseException:
            (folder / f"{number}-{rank}.error").write_text(traceback.format_exc())
            os._exit(1)
        file = folder / f"{number}-{rank}.json"
        file.with_suffix(".part").write_text(json.dumps(result))
        file.with_suffix(".part").rename(file)
    dist.barrier()
    os._exit(0)  # a group's threads can hold a process that is done


if __name__ == "__main__":
    sys.exit(_lead(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
