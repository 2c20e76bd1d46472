"""Our C++ kernels for CPUs, built at their first use; and the elementwise ones of training.

Without a compiler, or on another system, ``load`` says so and torch's operators are used.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from openmythos.seams import require

TRAINING = ("attention", "experts", "fused")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")


def find_compiler() -> str | None:
    """The C++ compiler: ``CXX``, or the first one there is."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def require_compiler(name: str, wanted: bool) -> None:
    """Refuse a setting that asks for ``torch.compile`` where it cannot work.

    Raises:
        ValueError: It is wanted and there is no C++ compiler.
    """
    allowed = "False without a C++ compiler: install g++ or set CXX"
    require(not wanted or find_compiler() is not None, name, wanted, allowed)


@functools.cache
def load(name: str) -> bool:
    """Build ``name.cpp`` of this folder if it is not built yet, and load its operators.

    False if there is no compiler for it; if the compiler fails, with one warning.
    ``TORCH_EXTENSIONS_DIR`` says where the libraries are kept.
    """
    compiler = find_compiler()
    if sys.platform != "linux" or compiler is None:
        return False
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        torch.ops.load_library(_build(source, compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"torch's own operators are used, because {source.name} could not be "
            f"built with {compiler}: {reason.strip().splitlines()[-1]}",
            stacklevel=2,
        )
        return False
    return True


def load_for_training() -> None:
    """Load what a step of training uses, so that no step waits for a compiler; seconds, once."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, TRAINING))


def _build(source: Path, compiler: str) -> Path:
    """The library's file; its name tells the source, torch and the processor it is made for."""
    from torch.utils import cpp_extension

    command = [compiler, *FLAGS, *(f"-I{path}" for path in cpp_extension.include_paths())]
    command += [str(source), *(f"-L{path}" for path in cpp_extension.library_paths())]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-o"]
    made_for = f"{torch.__version__} {command} {_processor()}".encode()
    sources = source.read_bytes() + source.with_name("tiles.h").read_bytes()
    digest = hashlib.sha256(sources + made_for).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    target = Path(root, "openmythos", f"{source.stem}_{digest}.so")
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


# --- elementwise operations and their gradients, in one pass each; else as torch's operators ------


def rms_norm(
    x: Float[Tensor, "... C"], weight: Float[Tensor, "C"] | None, eps: float
) -> tuple[Float[Tensor, "... C"], Float[Tensor, "... 1"]]:
    """``weight * x / rms(x)``, and ``1 / rms(x)``."""
    if has_fused(x, weight):
        kernel = torch.ops.openmythos_fused.rms_norm
        y, scale = kernel(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps)
        return y.view(x.shape), scale.view(*x.shape[:-1], 1)
    y = x.square()
    scale = y.mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(x, scale, out=y)
    return y if weight is None else y.mul_(weight), scale


def rms_norm_backward(
    grad: Float[Tensor, "... C"],
    x: Float[Tensor, "... C"],
    weight: Float[Tensor, "C"] | None,
    scale: Float[Tensor, "... 1"],
) -> tuple[Float[Tensor, "... C"], Float[Tensor, "C"] | None]:
    """The gradients of x and of the weight."""
    # With n = x / rms(x) and g = grad * weight: (g - n mean(g n)) / rms(x).
    if has_fused(x, weight, grad):
        kernel = torch.ops.openmythos_fused.rms_norm_backward
        rows = (each.reshape(-1, x.shape[-1]).contiguous() for each in (grad, x))
        grad_x, grad_weight = kernel(*rows, weight, scale)
        return grad_x.view(x.shape), None if weight is None else grad_weight
    unit = x * scale
    products, grad_weight = grad * unit, None
    if weight is not None:
        grad_weight = products.flatten(0, -2).sum(dim=0)
        products *= weight
    mean = products.mean(dim=-1, keepdim=True)
    through = grad.clone() if weight is None else torch.mul(grad, weight, out=products)
    return through.addcmul_(unit, mean, value=-1).mul_(scale), grad_weight


def swiglu(
    inner: Float[Tensor, "M _"],
    share: Float[Tensor, "N K"] | None = None,
    order: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, "M F"]:
    """``SiLU(gate) * up``, the halves of ``inner``; times entry ``order[m]`` of the shares."""
    if has_fused(inner, share):
        hidden: Tensor = torch.ops.openmythos_fused.swiglu(inner.contiguous(), share, order)
        return hidden
    gate, up = inner.chunk(2, dim=-1)
    hidden = functional.silu(gate).mul_(up)
    return hidden if share is None else hidden.mul_(share.flatten()[order, None])


def swiglu_backward(
    grad: Float[Tensor, "M F"],
    inner: Float[Tensor, "M _"],
    share: Float[Tensor, "N K"] | None = None,
    order: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "M _"], Float[Tensor, "N K"] | None]:
    """The gradients of ``inner`` and of the shares."""
    if has_fused(inner, share, grad):
        kernel = torch.ops.openmythos_fused.swiglu_backward
        grad_inner, grad_share = kernel(grad.contiguous(), inner.contiguous(), share, order)
        return grad_inner, None if share is None else grad_share
    gate, up = inner.chunk(2, dim=-1)
    active, grad_inner, grad_share = functional.silu(gate), torch.empty_like(inner), None
    if share is not None:
        grad_share = torch.empty_like(share)
        grad_share.view(-1)[order] = (grad * active).mul_(up).sum(dim=-1)
        grad = grad * share.flatten()[order, None]
    grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
    torch.mul(grad, active, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grad_inner, grad_share


def has_fused(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether our elementwise kernels take them: fp32 on a CPU, eagerly, in whole vectors."""
    floats = [x, *(tensor for tensor in tensors if tensor is not None)]
    plain = all(each.dtype == torch.float32 and each.device.type == "cpu" for each in floats)
    eager = x.numel() > 0 and not torch.compiler.is_compiling()
    return plain and x.shape[-1] % 32 == 0 and eager and load("fused")
