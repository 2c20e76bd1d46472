import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from openmythos.train.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def touch():
    memory = libc.malloc(48_000_000)  # 11,719 pages
    libc.memset(memory, 1, 48_000_000)
    libc.free(memory)

if sys.argv[1] == "keep":
    assert keep_freed_memory()
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_is_used_again() -> None:
    def pages(what: str) -> int:
        command = [sys.executable, "-c", PROGRAM, what]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert pages("keep") < 100 < 10_000 < pages("default")
