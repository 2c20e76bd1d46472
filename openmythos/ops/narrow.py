"""Products of few rows on a CPU: a C++ kernel that reads the weights in one stream.

Decoding multiplies one or a few rows by every weight of the model, so its time is that of reading
them. The library's matrix-vector product walks through several rows of a matrix at once, which
reads memory at less than half the speed of one straight pass. Its reference is ``linear`` of torch.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_ROWS = 8  # beyond, the library's blocked product is faster
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")


@functools.cache
def load() -> bool:
    """Build the kernels if they are not built yet, and load them; False, with one warning, if not.

    The library is kept in torch's folder for extensions (``TORCH_EXTENSIONS_DIR``).
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if sys.platform != "linux" or compiler is None:
        return False
    try:
        torch.ops.load_library(_build(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"decoding uses torch's matrix products, because {SOURCE.name} could not be built "
            f"with {compiler}: {reason.strip().splitlines()[-1]}",
            stacklevel=2,
        )
        return False
    torch.library.register_fake("openmythos_narrow::linear", _fake_linear)
    torch.library.register_fake("openmythos_narrow::experts", _fake_experts)
    return True


def _build(compiler: str) -> Path:
    """The library's file; its name tells the source, torch and the processor it is made for."""
    from torch.utils import cpp_extension

    command = [compiler, *FLAGS, *(f"-I{path}" for path in cpp_extension.include_paths())]
    command += [str(SOURCE), *(f"-L{path}" for path in cpp_extension.library_paths())]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-o"]
    made_for = f"{torch.__version__} {command} {_processor()}".encode()
    name = hashlib.sha256(SOURCE.read_bytes() + made_for).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    target = Path(root, "openmythos", f"narrow_{name}.so")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([*command, str(fresh)], check=True, capture_output=True, text=True)
        fresh.replace(target)
    return target


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def linear(x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "... O"]:
    """``x weight^T`` for at most ``MAX_ROWS`` rows of fp32 on a CPU, after ``load``."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.ops.openmythos_narrow.linear(flat, weight.contiguous())
    return y.view(*x.shape[:-1], -1)


def experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E _ D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """As ``ops.moe.gathered_experts``, after ``load``."""
    return torch.ops.openmythos_narrow.experts(
        x.contiguous(), expert.contiguous(), weight.contiguous(), gate_up, down
    )


def _fake_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_experts(
    x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    return torch.empty_like(x)
