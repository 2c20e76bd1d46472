"""Our C++ kernels for CPUs: the compiler, and libraries that are built at their first use.

Without a compiler, or on another system, ``load`` says so and torch's operators are used. The
kernels that ``OPENMYTHOS_KERNELS_OFF`` names (as ``attention,experts``) are not used either.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

from openmythos.config.schema import require
from openmythos.folder import put_in_place
from openmythos.terminal import note

EAGER = ("attention", "experts")  # what any eager forward may use
KERNELS = (*EAGER, "narrow")
OFF = "OPENMYTHOS_KERNELS_OFF"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")
_LOCK = threading.RLock()
KEPT: ContextVar[Sequence[str] | None] = ContextVar("KEPT", default=None)  # eager ones; None: all


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: ``CXX``, or the first one there is; None if there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++"):
        command = shlex.split(name or "")
        if command and shutil.which(command[0]):
            return command
    return None


def require_compiler(name: str, wanted: bool) -> None:
    """Refuse a setting that asks for ``torch.compile`` where it cannot work.

    Raises:
        ValueError: It is wanted and there is no C++ compiler.
    """
    allowed = "False without a C++ compiler: install g++ or set CXX"
    found = sys.platform == "win32" or find_compiler() is not None  # torch looks for its own there
    require(not wanted or found, name, wanted, allowed)


def load(name: str) -> bool:
    """Build ``name.cpp`` of this folder if it is not built yet, and load its operators.

    The first of the eager kernels that is asked for builds all of them, side by side: seconds, once
    on a machine. False if it is switched off or there is no compiler; if the compiler fails, with
    one warning. ``TORCH_EXTENSIONS_DIR`` says where the libraries are kept.

    Raises:
        ValueError: ``OPENMYTHOS_KERNELS_OFF`` names no kernel.
    """
    kept = KEPT.get()
    if name in switched_off() or (kept is not None and name in EAGER and name not in kept):
        return False
    with _LOCK:
        return _load(name)


def switched_off() -> list[str]:
    """The kernels that ``OPENMYTHOS_KERNELS_OFF`` names.

    Raises:
        ValueError: There is none of that name.
    """
    given = os.environ.get(OFF, "")
    names = given.split(",") if given else []
    require(all(name in KERNELS for name in names), OFF, given, f"names of {', '.join(KERNELS)}")
    return names


@functools.cache
def _load(name: str) -> bool:
    compiler = find_compiler()
    if sys.platform != "linux" or compiler is None:
        return False
    try:
        with ThreadPoolExecutor() as pool:
            names = EAGER if name in EAGER else (name,)
            built = {each: pool.submit(_build, each, compiler) for each in names}
        torch.ops.load_library(built[name].result())  # one after the other: it changes global flags
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(
            f"torch's own operators are used, because {name}.cpp could not be built with "
            f"{shlex.join(compiler)}: {_reason(error)}",
            stacklevel=3,
        )
        return False
    return True


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    """The first complaint of a compiler, or else its last words."""
    lines = [line.strip() for line in (getattr(error, "stderr", None) or "").splitlines()]
    complaints = [line for line in lines if "error:" in line] or [x for x in lines[::-1] if x]
    return complaints[0] if complaints else str(error)


def _build(name: str, compiler: list[str]) -> Path:
    """The library's file, built if it is not there."""
    target = library(name, compiler)
    if not target.exists():
        note(f"building kernels of {name} for this CPU, once ...")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder, target.name)
            command = [*_command(name, compiler), str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            put_in_place(fresh, target)
    return target


def library(name: str, compiler: list[str]) -> Path:
    """The library's file; its name tells the source, torch and the processor it is made for."""
    from torch.utils import cpp_extension

    folder = Path(__file__).parent
    sources = [path.read_bytes() for path in (folder / f"{name}.cpp", *sorted(folder.glob("*.h")))]
    made_for = f"{torch.__version__} {_command(name, compiler)} {processor()}".encode()
    digest = hashlib.sha256(b"".join((*sources, made_for))).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root, "openmythos", f"{name}_{digest}.so")


def _command(name: str, compiler: list[str]) -> list[str]:
    """What builds a library, up to the name of its file."""
    from torch.utils import cpp_extension

    command = [*compiler, *FLAGS, *(f"-I{path}" for path in cpp_extension.include_paths())]
    source = Path(__file__).with_name(f"{name}.cpp")
    command += [str(source), *(f"-L{path}" for path in cpp_extension.library_paths())]
    return [*command, "-ltorch", "-ltorch_cpu", "-lc10", "-o"]


def processor() -> str:
    """Its name and abilities, which ``-march=native`` depends on: machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))


def takes(name: str, *tensors: Tensor | None) -> bool:
    """Whether the kernels of ``name`` may be used: eagerly, on plain fp32 tensors of a CPU."""
    if not eager():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(type(each) in (Tensor, nn.Parameter) for each in given)  # not fake, not sharded
    fp32 = all(each.dtype == torch.float32 and each.device.type == "cpu" for each in given)
    return plain and fp32 and all(each.numel() > 0 for each in given) and load(name)


def eager() -> bool:
    """Whether this is plain eager code: not compiled, not under a transform of ``torch.func``."""
    transformed = torch._C._functorch.peek_interpreter_stack
    return not torch.compiler.is_compiling() and transformed() is None


def vmapped() -> bool:
    """Whether this runs under ``torch.func.vmap``, where no value can be looked at."""
    if torch.compiler.is_compiling():  # which cannot trace the next line
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in stack)
