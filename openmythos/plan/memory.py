"""The memory that this machine has left, refusals that name what was needed, and its lack."""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def free_bytes() -> int | None:
    """Bytes that a process can still get, swap included; None if the system does not say."""
    if MEMINFO.is_file():
        lines = [line.split() for line in MEMINFO.read_text(encoding="ascii").splitlines()]
        sizes = {words[0]: 1024 * int(words[1]) for words in lines if len(words) == 3}
        free = sizes.get("MemAvailable:", 0) + sizes.get("SwapFree:", 0)
        limit = _number(CGROUP / "memory.max")
        # A container's limit counts its file cache too, which it can give back: used is not taken.
        return free if limit is None else min(free, limit)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


class DoesNotFitError(ValueError):
    """What was asked for needs more memory than the machine has."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory was lacking; torch has no class of its own for it."""
    said = str(error).lower()
    lacking = isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
    return lacking or isinstance(error, (MemoryError, DoesNotFitError))


def require_memory(needed: int, what: str, advice: str) -> None:
    """Refuse what cannot fit into this machine's memory, before it is begun.

    Raises:
        DoesNotFitError: ``what`` needs more bytes than are free; says how many, and ``advice``.
    """
    free = free_bytes()
    if free is not None and needed > free:
        raise DoesNotFitError(
            f"{what} needs {in_words(needed)} of memory and this machine has {in_words(free)} "
            f"free; {advice}"
        )


def in_words(size: int) -> str:
    """Bytes with one decimal and a unit, powers of 1024."""
    value, power = float(size) if size < 2**1000 else float("inf"), 0
    while value >= 1024 and power < len(UNITS) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.1f} {UNITS[power]}" if power else f"{size} bytes"


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file or it says ``max``."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
