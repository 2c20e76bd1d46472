"""Our C++ kernels for CPUs, built at their first use; and the elementwise ones of training.

Without a compiler, or on another system, ``load`` says so and torch's operators are used.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from openmythos.config.schema import require
from openmythos.folder import put_in_place

EAGER = ("attention", "experts", "fused")  # what any eager forward may use
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")
_LOCK = threading.RLock()


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
    on a machine. False if there is no compiler; if the compiler fails, with one warning.
    ``TORCH_EXTENSIONS_DIR`` says where the libraries are kept.
    """
    with _LOCK:
        return _load(name)


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
    """The library's file; its name tells the source, torch and the processor it is made for."""
    from torch.utils import cpp_extension

    source = Path(__file__).with_name(f"{name}.cpp")
    command = [*compiler, *FLAGS, *(f"-I{path}" for path in cpp_extension.include_paths())]
    command += [str(source), *(f"-L{path}" for path in cpp_extension.library_paths())]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-o"]
    made_for = f"{torch.__version__} {command} {_processor()}".encode()
    sources = source.read_bytes() + source.with_name("tiles.h").read_bytes()
    digest = hashlib.sha256(sources + made_for).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    target = Path(root, "openmythos", f"{name}_{digest}.so")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder, target.name)
            subprocess.run([*command, str(fresh)], check=True, capture_output=True, text=True)
            put_in_place(fresh, target)
    return target


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


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


def gradients_again(
    ctx: Any, function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a function's inputs that can themselves be differentiated.

    For the backward pass of a Function whose kernel cannot: ``function`` is made of torch's
    operators.
    """
    needs = ctx.needs_input_grad[: len(inputs)]
    pairs = zip(inputs, needs, strict=True)
    wanted = [tensor for tensor, need in pairs if need and tensor is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


# --- elementwise operations and their gradients, in one pass each; else as torch's operators ------


def rms_norm(
    x: Float[Tensor, "... C"], weight: Float[Tensor, "C"] | None, eps: float
) -> tuple[Float[Tensor, "... C"], Float[Tensor, "... 1"]]:
    """``weight * x / rms(x)``, and ``1 / rms(x)``."""
    if _whole(x) and _matches(weight, x) and takes("fused", x, weight):
        y, scale = torch.ops.openmythos_fused.rms_norm(x.contiguous(), _packed(weight), eps)
        return y, scale.view(*x.shape[:-1], 1)
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
    if _whole(x) and _matches(weight, x) and takes("fused", x, weight, grad):
        kernel = torch.ops.openmythos_fused.rms_norm_backward
        grad_x, grad_weight = kernel(grad.contiguous(), x.contiguous(), _packed(weight), scale)
        return grad_x, None if weight is None else grad_weight
    unit = x * scale
    products, grad_weight = grad * unit, None
    if weight is not None:
        grad_weight = products.flatten(0, -2).sum(dim=0)
        products *= weight
    mean = products.mean(dim=-1, keepdim=True)
    through = grad.clone() if weight is None else torch.mul(grad, weight, out=products)
    return through.addcmul_(unit, mean, value=-1).mul_(scale), grad_weight


def swiglu(
    inner: Float[Tensor, "... _"],
    share: Float[Tensor, "N K"] | None = None,
    order: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, "... F"]:
    """``SiLU(gate) * up``, the halves of ``inner``.

    With shares, row m of ``inner`` [M, 2 F] is also multiplied by entry ``order[m]`` of them.
    """
    if takes_swiglu(inner, share):
        kernel = torch.ops.openmythos_fused.swiglu
        hidden: Tensor = kernel(inner.contiguous(), _packed(share), order)
        return hidden
    gate, up = inner.chunk(2, dim=-1)
    hidden = functional.silu(gate).mul_(up)
    return hidden if share is None else hidden.mul_(share.flatten()[order, None])


def swiglu_backward(
    grad: Float[Tensor, "... F"],
    inner: Float[Tensor, "... _"],
    share: Float[Tensor, "N K"] | None = None,
    order: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "... _"], Float[Tensor, "N K"] | None]:
    """The gradients of ``inner`` and of the shares."""
    if takes_swiglu(inner, share) and takes("fused", grad):
        kernel = torch.ops.openmythos_fused.swiglu_backward
        packed = grad.contiguous(), inner.contiguous(), _packed(share)
        grad_inner, grad_share = kernel(*packed, order)
        return grad_inner, None if share is None else grad_share
    gate, up = inner.chunk(2, dim=-1)
    active, grad_inner, grad_share = functional.silu(gate), torch.empty_like(inner), None
    if share is not None:
        grad_share = share.new_empty(share.shape)
        grad_share.view(-1)[order] = (grad * active).mul_(up).sum(dim=-1)
        grad = grad * share.flatten()[order, None]
    grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
    torch.mul(grad, active, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grad_inner, grad_share


def takes_swiglu(inner: Tensor, share: Tensor | None = None) -> bool:
    """Whether ``swiglu`` is one pass for these."""
    return _whole(inner) and takes("fused", inner, share)


def _whole(x: Tensor) -> bool:
    """Whether rows are whole vectors of the widest processors, two halves of them too."""
    return x.shape[-1] % 32 == 0


def _matches(weight: Tensor | None, x: Tensor) -> bool:
    return weight is None or weight.shape == x.shape[-1:]


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
