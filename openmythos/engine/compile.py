"""Compiled decoding: ``torch.compile``, with our CPU kernels for matrix products of few rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.nn import functional

from openmythos.model.loop import run_loop
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import int8, narrow
from openmythos.ops.moe import gathered_experts

RECOMPILE_LIMIT = 64  # compiled graphs per function; past this number it runs eagerly


@dataclass(frozen=True)
class Calls:
    """The functions that decode a token, either eager or compiled; ``run`` is ``run_loop``."""

    encode: Callable[..., Tensor]
    run: Callable[..., tuple[Any, ...]]
    decode: Callable[..., Tensor]


EAGER = Calls(RecurrentDepthLM.encode, run_loop, RecurrentDepthLM.decode)
# A model is compiled once for all its users; the entry is dropped when the model is freed.
_COMPILED: WeakKeyDictionary[RecurrentDepthLM, Calls] = WeakKeyDictionary()


def compiled_calls(model: RecurrentDepthLM) -> Calls:
    """The compiled calls of a model."""
    if model not in _COMPILED:
        _COMPILED[model] = Calls(*map(compile_call, (EAGER.encode, EAGER.run, EAGER.decode)))
    return _COMPILED[model]


def compile_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``call`` for one model, whose modules and settings must not change afterwards.

    Guards on modules and on global names are skipped, because checking them takes longer than some
    of the products. The compiled function must therefore be used with this model only.
    """
    for product in (gathered_experts, *int8.KERNELS):
        torch.compiler.allow_in_graph(product)  # keep it one node, to be replaced below
    settings: dict[str, Any] = {  # torch's type stubs lack some of them
        "backend": _backend,
        "recompile_limit": RECOMPILE_LIMIT,
        "isolate_recompiles": True,
        "options": {"guard_filter_fn": _kept_guards},
    }
    compiled: Callable[..., Any] = torch.compile(call, **settings)
    return compiled


def record(call: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    """Compile and run ``call``; return its result, and what runs the compiled code again.

    All that it reads, the tensors that it closes over and the weights of modules, is read where it
    was, and what it changes in place is changed there: nothing is looked up or checked again, which
    takes longer than a layer of a small model. It returns one tensor or nothing.
    """
    found: list[Callable[[], Any]] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        compiled = _backend(graph, inputs)

        def first(*inputs: Any) -> Any:
            found.append(lambda: compiled(*inputs))
            return compiled(*inputs)

        return first

    torch.compiler.allow_in_graph(gathered_experts)  # as in ``compile_call``
    settings: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
    settings |= {"recompile_limit": RECOMPILE_LIMIT, "isolate_recompiles": True}
    settings["options"] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    result = torch.compile(call, **settings)()
    (again,) = found
    return result, again if result is None else lambda: again()[0]


def _kept_guards(entries: Sequence[Any]) -> list[bool]:
    """Which guards to keep: those on what differs from call to call."""
    modules = torch.compiler.skip_guard_on_all_nn_modules_unsafe(entries)
    names = torch.compiler.skip_guard_on_globals_unsafe(entries)
    return [all(keep) for keep in zip(modules, names, strict=True)]


def _backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor, after replacing the products that the ``narrow`` kernels take."""
    from torch._inductor.compile_fx import compile_fx  # takes seconds to import

    kernels = {functional.linear: narrow.linear, gathered_experts: narrow.experts}
    for node in graph.graph.nodes:
        if node.target in int8.KERNELS:
            case = (getattr(arg, "meta", {}).get("example_value", arg) for arg in node.args)
            if int8.beats_torch(node.target, *case):
                node.target = int8.KERNELS[node.target]
        if node.target in kernels and _is_narrow(node) and narrow.load() and _wins(node):
            operands = tuple(node.all_input_nodes)  # drops bias=None
            node.target, node.args = kernels[node.target], operands
    graph.recompile()
    return compile_fx(graph, list(inputs), config_patches={"size_asserts": False})


def _is_narrow(node: fx.Node) -> bool:
    """Whether all operands are fp32 on a CPU and the first has few rows."""
    tensors = [arg.meta["example_value"] for arg in node.all_input_nodes]
    x = tensors[0]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if node.target is functional.linear and len(tensors) != 2:
        return False  # with a bias
    plain = all(tensor.device.type == "cpu" for tensor in tensors) and all(
        tensor.dtype == torch.float32 for tensor in floats
    )
    return plain and x.numel() // x.shape[-1] <= narrow.MAX_ROWS


def _wins(node: fx.Node) -> bool:
    """Whether our kernel is the faster one here; a graph of several row counts asks for one."""
    x, *others = (arg.meta["example_value"] for arg in node.all_input_nodes)
    rows = x.numel() // x.shape[-1]
    rows = rows if isinstance(rows, int) else rows.node.hint
    if node.target is functional.linear:
        return narrow.beats_linear(rows, *others[0].shape)
    slots, (_, dim, width) = others[0].shape[1], others[-1].shape
    return narrow.beats_experts(rows, slots, width, dim)
