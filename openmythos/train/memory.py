"""The memory of a training process."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # numbers of mallopt's parameters in malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next step; False where that is not glibc.

    By default large tensors come fresh from the system at every step, page by page, which costs
    a tenth of a small model's step on a CPU. The price is a peak of memory that is about 40 %
    higher, and it holds for the whole process: a program asks for it, not the training loop.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
