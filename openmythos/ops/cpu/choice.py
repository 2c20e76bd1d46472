"""Which is faster on this machine, torch's product or ours: timed once, then remembered.

``OPENMYTHOS_KERNELS`` decides instead where it is ``ours`` or ``torch``; by default it is
``measure``. The timings stand beside the library that was built, in one file for each number of
threads; the library's name tells the processor, torch and the source.
"""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from openmythos.config.schema import require
from openmythos.folder import write_whole
from openmythos.ops.cpu import build

VARIABLE = "OPENMYTHOS_KERNELS"
WORTH = 1.1  # times as fast as torch's product ours must be to be used
REPEATS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of one product, by our kernel and by torch."""

    ours: float
    torch: float

    @property
    def ours_wins(self) -> bool:
        """Whether ours is faster by enough."""
        return self.torch >= WORTH * self.ours


_TIMINGS: dict[Path, dict[str, Timing]] = {}  # what this process has read or measured


def mode() -> Literal["measure", "ours", "torch"]:
    """What the environment says.

    Raises:
        ValueError: Something else.
    """
    for allowed in ("measure", "ours", "torch"):
        if os.environ.get(VARIABLE, "measure") == allowed:
            return allowed
    require(False, VARIABLE, os.environ[VARIABLE], "measure, ours or torch")
    raise AssertionError


def ours_wins(product: str, measure: Callable[[], Timing]) -> bool:
    """Whether our kernel is to be used for a product; ``measure`` is called the first time."""
    decided = mode()
    if decided != "measure":
        return decided == "ours"
    path = timings_file(torch.get_num_threads())
    known = _TIMINGS.setdefault(path, read_timings(path))
    if product not in known:
        known[product] = measure()
        _remember(path, known)
    return known[product].ours_wins


@contextlib.contextmanager
def keeping(names: Sequence[str] | None) -> Iterator[list[str]]:
    """Use these of the eager kernels inside, and no others; None: all that this machine has.

    Kernels add in different orders, so a run that goes on keeps the ones that it began with.

    Yields:
        The kernels in use. A warning names those that are missing here.
    """
    token = build.KEPT.set(names)
    try:
        used = [name for name in build.EAGER if build.load(name)]
        if missing := [name for name in names or () if name not in used]:
            warnings.warn(
                f"the run used our kernels for {', '.join(missing)} so far, which are switched off "
                "or cannot be built here; torch's operators go on, equal up to rounding",
                stacklevel=3,
            )
        yield used
    finally:
        build.KEPT.reset(token)


def race(ours: Callable[[], object], theirs: Callable[[], object], num_calls: int) -> Timing:
    """Medians of some runs in turn, each of so many calls, after one that is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + REPEATS):
        for run, spent in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run()
            spent.append((time.perf_counter() - start) / num_calls)
    return Timing(*(median(spent[1:]) for spent in seconds))


def timings_file(num_threads: int) -> Path:
    """Where the timings with so many threads are kept."""
    library = build.library("narrow", build.find_compiler() or [])
    return library.with_name(f"{library.stem}_{num_threads}_threads.json")


def read_timings(path: Path) -> dict[str, Timing]:
    """The timings of a file by their products; none if there is no such file, or a damaged one."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {name: Timing(**each) for name, each in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(path: Path, known: dict[str, Timing]) -> None:
    """Add to what other processes have stored; where nothing can be written it is timed again."""
    merged = read_timings(path) | known
    text = json.dumps({name: asdict(merged[name]) for name in sorted(merged)}, indent=2)
    try:
        write_whole(path, text + "\n")
    except OSError:
        return
