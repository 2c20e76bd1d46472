"""A pretended Apple GPU: tensors that say ``mps``, live on the CPU, and refuse what MPS refuses.

MPS has no fp64, and an operation takes tensors of one device (0-dimensional ones of the CPU and
indices aside). Both raise here where the real device raises, so that code for it can be tested on
any machine. What is not pretended: the real kernels, their speed and their rounding.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

MPS, CPU = torch.device("mps", 0), torch.device("cpu")
MADE_BY_AUTOGRAD = ("zeros", "ones", "scalar_tensor", "new_zeros", "new_empty_strided")
CROSSING = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")


class OnMps(Tensor):
    """A tensor that says it is on MPS. C++ sees the CPU, so that autograd works."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnMps":
        assert not isinstance(inner, OnMps)
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {inner.dtype}: MPS has no float64")
        inner = inner.resolve_conj().resolve_neg()  # bits that the wrapper does not have
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    device = property(lambda self: MPS)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: done on the CPU, refused where MPS refuses."""
    name = func._schema.name.removeprefix("aten::")
    flat, shape = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, OnMps)]
    theirs = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnMps) and x.ndim]
    if ours and theirs and name not in CROSSING:
        raise RuntimeError(f"{name}: expected all tensors on one device, found mps:0 and cpu")
    on_mps = bool(ours)
    if kwargs.get("device") is not None:
        on_mps = torch.device(kwargs["device"]).type == "mps"
    elif name == "copy_":
        on_mps = isinstance(args[0], OnMps)
    if Calls.backward and not theirs and name in MADE_BY_AUTOGRAD:
        on_mps = True  # autograd made it in C++, which sees the CPU
    plain = [x.inner if isinstance(x, OnMps) else x for x in flat]
    given, options = tree_unflatten(
        [CPU if isinstance(x, torch.device) else x for x in plain], shape
    )
    made = func(*given, **options)
    known = {id(x.inner): x for x in ours}  # an operation in place returns what it was given

    def placed(x: Any) -> Any:
        return known.get(id(x)) or OnMps(x) if isinstance(x, Tensor) and on_mps else x

    return tree_map(lambda x: known[id(x)] if id(x) in known else placed(x), made)


class Operations(TorchDispatchMode):
    """Sends what ``device="mps"`` makes through ``compute``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """The calls of Python whose device C++ would get wrong."""

    backward = False  # whether autograd's engine runs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = CALLS.get(func)
        return (call or func)(*((func, *args) if call else args), **(kwargs or {}))


def _to(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            device = value
    device = x.device if device is None else torch.device(device)
    dtype = x.dtype if dtype is None else dtype
    if device.type == x.device.type and dtype == x.dtype:
        return x
    return torch.ops.aten._to_copy.default(x, dtype=dtype, device=device)


def _made(func: Any, data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    place = torch.device(device) if device is not None else getattr(data, "device", CPU)
    if isinstance(data, Tensor):
        return _to(func, data, device=place, **kwargs)
    return _to(func, func(data, *args, **kwargs), place)


def _new(func: Any, x: Tensor, data: Any, **kwargs: Any) -> Tensor:
    return _made(torch.tensor, data, **{"dtype": x.dtype, "device": x.device, **kwargs})


def _numpy(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, OnMps):
        raise TypeError("can't convert mps:0 device type tensor to numpy; use Tensor.cpu() first")
    return func(x, *args, **kwargs)


def _backward(func: Any, x: Tensor, gradient: Any = None, **kwargs: Any) -> None:
    Calls.backward = isinstance(x, OnMps)
    try:
        with Calls():  # checkpointing runs the forward again
            torch.autograd.backward(x, gradient, **kwargs)
    finally:
        Calls.backward = False


CALLS: dict[Any, Callable[..., Any]] = {
    Tensor.backward: _backward,
    Tensor.to: _to,
    Tensor.cpu: lambda func, x: _to(func, x, CPU),
    Tensor.double: lambda func, x: _to(func, x, torch.float64),
    Tensor.numpy: _numpy,
    Tensor.tolist: lambda func, x: func(x.inner if isinstance(x, OnMps) else x),
    Tensor.new_tensor: _new,
    torch.tensor: _made,
    torch.as_tensor: _made,
}


@contextlib.contextmanager
def pretended_mps() -> Iterator[None]:
    """Inside, ``device="mps"`` works as if there were such a device."""
    with Operations(), Calls():
        yield


def to_mps(module: nn.Module) -> None:
    """Move a module's parameters and buffers there, in place."""
    for part in module.modules():
        for name, param in part._parameters.items():
            if param is not None:
                part._parameters[name] = nn.Parameter(OnMps(param.detach()), param.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnMps(buffer)
