"""The experts' products: a loop over experts as reference, one grouped product as fast path.

On a CPU the grouped kernel is a loop over all experts as well, and ``LoopedExperts`` is faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from openmythos.ops.cpu import build as native
from openmythos.ops.swiglu import swiglu, swiglu_backward


def grouped_mm_reference(
    x: Float[Tensor, "M I"], weights: Float[Tensor, "E O I"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "M O"]:
    """Rows ``ends[e-1] .. ends[e]`` of x times the transposed weights of expert e."""
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        parts.append(x[start:end] @ weights[expert].T)
        start = end
    return torch.cat(parts)


def grouped_mm(
    x: Float[Tensor, "M I"], weights: Float[Tensor, "E O I"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "M O"]:
    """As the reference; one kernel where torch has one (not fp64, rows of whole 16 bytes)."""
    if torch.compiler.is_compiling():
        return _opaque_grouped_mm(x, weights, ends)
    return _grouped_mm(x, weights, ends)


def _grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if not _has_kernel(x, weights):
        return grouped_mm_reference(x, weights, ends)
    return functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)


def _has_kernel(x: Tensor, weights: Tensor) -> bool:
    unit = 16 // x.element_size()
    aligned = weights.shape[1] % unit == 0 and weights.shape[2] % unit == 0
    return x.dtype != torch.float64 and aligned


# The compiler lowers grouped_mm in bf16 only; as an opaque operator it runs in every dtype.
@torch.library.custom_op("openmythos::grouped_mm", mutates_args=())
def _opaque_grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return _grouped_mm(x, weights, ends).clone()


@_opaque_grouped_mm.register_fake
def _fake_grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1])


@torch.library.custom_op("openmythos::grouped_mm_backward", mutates_args=())
def _opaque_grouped_mm_backward(
    grad: Tensor, x: Tensor, weights: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    # Written out: autograd records nothing inside an opaque operator.
    grad_x = _grouped_mm(grad, weights.transpose(1, 2), ends).clone()
    if _has_kernel(x, weights):
        return grad_x, functional.grouped_mm(grad.T, x, offs=ends).clone()
    starts = [0, *ends.tolist()]
    blocks = [slice(start, stop) for start, stop in pairwise(starts)]
    return grad_x, torch.stack([grad[block].T @ x[block] for block in blocks])


@_opaque_grouped_mm_backward.register_fake
def _fake_grouped_mm_backward(
    grad: Tensor, x: Tensor, weights: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights)


def _keep_inputs(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weights, ends = ctx.saved_tensors  # type: ignore[attr-defined]
    return (*_opaque_grouped_mm_backward(grad.contiguous(), x, weights, ends), None)


_opaque_grouped_mm.register_autograd(_backward, setup_context=_keep_inputs)


@dataclass(frozen=True)
class Pairs:
    """The (token, slot) pairs of a batch, sorted by expert: each expert's are one block."""

    order: Int[Tensor, "M"]  # which pair stands at m, counted token by token
    token: Int[Tensor, "M"]
    ends: Int[Tensor, "E"]  # of the experts' blocks

    @cached_property
    def blocks(self) -> list[tuple[int, slice]]:
        """Each expert that has pairs, and where they are."""
        bounds = pairwise([0, *self.ends.tolist()])
        return [(expert, slice(*pair)) for expert, pair in enumerate(bounds) if pair[0] < pair[1]]


def _sorted_pairs(
    expert: Int[Tensor, "N K"], counts: Int[Tensor, "E"]
) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"], Int[Tensor, "E"]]:
    """The fields of ``Pairs``, which the compiler does not know, from each token's experts."""
    order = expert.flatten().argsort(stable=True)
    return order, order // expert.shape[1], counts.cumsum(0)


class LoopedExperts:
    """The experts for every loop of one forward on a CPU.

    An expert without rows costs nothing. The gradient of the weights is made once for all loops,
    when the last of them has given its share: one product an expert over the rows of all loops,
    written where it belongs, instead of one gradient as large as all experts a loop.
    """

    def __init__(self, gate_up: Float[Tensor, "E _ D"], down: Float[Tensor, "E D F"]) -> None:
        self._weights = _LoopedWeights(gate_up.detach(), down.detach())
        wanted = torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad)
        # Every loop's result depends on it, so that its gradient comes after those of all loops.
        self._token = _Gradient.apply(gate_up, down, self._weights) if wanted else None

    def __call__(
        self,
        x: Float[Tensor, "N D"],
        expert: Int[Tensor, "N K"],
        weight: Float[Tensor, "N K"],
        counts: Int[Tensor, "E"],
    ) -> Float[Tensor, "N D"]:
        """As ``moe_experts``.

        Raises:
            ValueError: Shapes that do not fit, or counts that are not those of the experts.
        """
        width, num_pairs = self._weights.down.shape[1], int(counts.sum())
        fits = x.shape == (len(expert), width) and expert.shape == weight.shape
        if not fits or num_pairs != expert.numel():
            shapes = f"x {(*x.shape,)}, expert {(*expert.shape,)}, weight {(*weight.shape,)}"
            raise ValueError(f"{shapes}, {num_pairs} counted: they do not fit width {width}")
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(low), weight.to(low)
        pairs = Pairs(*_sorted_pairs(expert, counts))
        y: Tensor = _Experts.apply(x, weight, self._token, self._weights, pairs)
        return y


class _LoopedWeights:
    """The weights of all experts, and what the loops give to their gradient."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down = gate_up, down
        self._uses: list[tuple[Pairs, Tensor, Tensor, Tensor, Tensor]] = []
        self._backward_pass = -1

    def add_use(self, pairs: Pairs, x: Tensor, inner: Tensor, hidden: Tensor, y: Tensor) -> None:
        """Keep x, hidden, and the gradients of what the weights made of them: inner and y."""
        current = torch._C._current_graph_task_id()
        if current != self._backward_pass:  # what an earlier one left has nothing to do with it
            self._uses.clear()
        self._backward_pass = current
        self._uses.append((pairs, x, inner, hidden, y))

    def gradients(self, *wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of both weights from the uses of this backward pass."""
        if not self._uses:
            raise RuntimeError("experts in another backward pass; set use_reentrant=False")
        pairs, x, inner, hidden, y = zip(*self._uses, strict=True)
        self._uses.clear()
        token, place = [each.token for each in pairs], [torch.arange(len(each)) for each in hidden]
        return (
            _outer_products(self.gate_up, pairs, inner, place, x, token) if wanted[0] else None,
            _outer_products(self.down, pairs, y, token, hidden, place) if wanted[1] else None,
        )


class _Gradient(torch.autograd.Function):
    """An empty number that stands for the weights; its gradient is theirs."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor, down: Tensor, weights: _LoopedWeights) -> Tensor:
        ctx.weights = weights  # type: ignore[attr-defined]
        return gate_up.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.weights.gradients(*ctx.needs_input_grad[:2]), None)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        share: Tensor,
        token: Tensor | None,
        weights: _LoopedWeights,
        pairs: Pairs,
    ) -> Tensor:
        inner = _multiply(x, pairs.token, weights.gate_up, pairs, transposed=True)
        hidden = swiglu(inner).mul_(share.flatten()[pairs.order, None])
        # The weights as well, so that a change of them is noticed.
        ctx.save_for_backward(x, share, inner, hidden, weights.gate_up, weights.down)
        ctx.weights, ctx.pairs = weights, pairs  # type: ignore[attr-defined]
        return _multiply_add(hidden, len(x), weights.down, pairs, transposed=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("second derivatives of experts on a CPU are not supported")
        x, share, inner, hidden, gate_up, down = ctx.saved_tensors
        weights, pairs, grad_x, grad_token = ctx.weights, ctx.pairs, None, None
        through = _multiply(grad, pairs.token, down, pairs, transposed=False)
        grad_inner, grad_share = swiglu_backward(through, inner, share, pairs.order)
        if ctx.needs_input_grad[0]:
            grad_x = _multiply_add(grad_inner, len(x), gate_up, pairs, transposed=False)
        if ctx.needs_input_grad[2]:
            weights.add_use(pairs, x, grad_inner, hidden, grad)
            grad_token = gate_up.new_zeros(())
        return grad_x, grad_share, grad_token, None, None


def _multiply(
    x: Float[Tensor, "N _"],
    source: Int[Tensor, "M"],
    weights: Float[Tensor, "E O I"],
    pairs: Pairs,
    *,
    transposed: bool,
) -> Float[Tensor, "M _"]:
    """Row ``source[m]`` of x times the weights W of m's expert: x W^T if transposed, else x W."""
    if _has_native(weights, x):
        kernel = torch.ops.openmythos_experts.multiply
        product: Tensor = kernel(x.contiguous(), source, weights, pairs.ends, transposed)
        return product
    rows = x.index_select(0, source)
    product = rows.new_empty(len(rows), weights.shape[1 if transposed else 2])
    for expert, block in pairs.blocks:
        weight = weights[expert].to(x.dtype)
        torch.mm(rows[block], weight.mT if transposed else weight, out=product[block])
    return product


def _multiply_add(
    x: Float[Tensor, "M _"],
    num_tokens: int,
    weights: Float[Tensor, "E O I"],
    pairs: Pairs,
    *,
    transposed: bool,
) -> Float[Tensor, "N _"]:
    """As ``_multiply`` of all rows, summed over the pairs of each token."""
    if _has_native(weights, x):
        kernel = torch.ops.openmythos_experts.multiply_add
        packed = x.contiguous()
        total: Tensor = kernel(packed, pairs.token, weights, pairs.ends, transposed, num_tokens)
        return total
    every = torch.arange(len(x), device=x.device)
    rows = _multiply(x, every, weights, pairs, transposed=transposed)
    num_slots = max(len(x) // max(num_tokens, 1), 1)
    place = pairs.token.argsort(stable=True).view(num_tokens, num_slots)
    return functional.embedding_bag(place, rows, mode="sum")


def _outer_products(
    weights: Float[Tensor, "E O I"],
    pairs: Sequence[Pairs],
    left: Sequence[Float[Tensor, "_ O"]],
    left_rows: Sequence[Int[Tensor, "_"]],
    right: Sequence[Float[Tensor, "_ I"]],
    right_rows: Sequence[Int[Tensor, "_"]],
) -> Float[Tensor, "E O I"]:
    """Each expert's sum of ``left^T right`` over its pairs in all loops, each at its rows."""
    result = _lazy_zeros_like(weights)
    if _has_native(weights, *left, *right):
        ends = [each.ends for each in pairs]
        lefts, rights = ([each.contiguous() for each in side] for side in (left, right))
        torch.ops.openmythos_experts.gradient(result, lefts, left_rows, rights, right_rows, ends)
        return result
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for loop, each in enumerate(pairs):
        for expert, block in each.blocks:
            rows = (left[loop][left_rows[loop][block]], right[loop][right_rows[loop][block]])
            parts.setdefault(expert, []).append(rows)
    for expert, loops in parts.items():
        a, b = (torch.cat(tensors) for tensors in zip(*loops, strict=True))
        result[expert] = a.mT @ b
    return result


def _has_native(weights: Tensor, *tensors: Tensor) -> bool:
    """Whether our kernel takes them: in whole tiles of the widest vectors."""
    whole = weights.shape[1] % 32 == 0 and weights.shape[2] % 32 == 0 and weights.is_contiguous()
    return whole and native.takes("experts", weights, *tensors)


def _lazy_zeros_like(tensor: Tensor) -> Tensor:
    """Zeros that cost nothing until they are touched: the system makes their pages then."""
    zeros = torch.from_numpy(np.zeros(tensor.nbytes, dtype=np.uint8))
    return zeros.view(tensor.dtype).view(tensor.shape)


class _Spread(torch.autograd.Function):
    """Row ``token[m]`` of x for each pair m; ``place[n, k]`` is where token n's pair k went."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gathered: Tensor = _Gather.apply(grad, *ctx.saved_tensors)
        return gathered, None, None


class _Gather(torch.autograd.Function):
    """Each token's sum over its pairs, in the order of its slots; the transpose of ``_Spread``.

    index_add would add in any order on a GPU.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        return functional.embedding_bag(place, rows, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        spread: Tensor = _Spread.apply(grad, *ctx.saved_tensors)
        return spread, None, None


def gathered_experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E _ D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """As ``moe_experts`` for few tokens, each pair by itself: nothing is sorted.

    For the compiler only, which reads the chosen weights where they are; eager would copy them.
    """
    hidden = swiglu((gate_up[expert] * x[:, None, None, :]).sum(dim=-1)) * weight[..., None]
    return (down[expert] * hidden[:, :, None, :]).sum(dim=-1).sum(dim=1)


def _few(expert: Tensor, weights: Tensor) -> bool:
    compiling = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return compiling and expert.numel() <= len(weights)


def moe_experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    counts: Int[Tensor, "E"],
    gate_up: Float[Tensor, "E _ D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Sum over each token's K experts of ``weight * down(SiLU(gate x) * up x)``.

    Tokens are sorted by expert once, so that each expert's rows are one block of a grouped product.
    ``counts`` is the number of (token, slot) pairs of each expert.
    """
    if torch.is_autocast_enabled(x.device.type):  # the grouped kernel is unknown to autocast
        low = torch.get_autocast_dtype(x.device.type)
        x, weight, gate_up, down = (each.to(low) for each in (x, weight, gate_up, down))
    if _few(expert, gate_up):
        return gathered_experts(x, expert, weight, gate_up, down)
    order, token, ends = _sorted_pairs(expert, counts)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    place, ends = places.view(expert.shape), ends.to(torch.int32)
    compiling = torch.compiler.is_compiling()  # the compiler fuses these two by itself
    rows: Tensor = x[token] if compiling else _Spread.apply(x, token, place)
    hidden = swiglu(grouped_mm(rows, gate_up, ends)) * weight.flatten()[order, None]
    rows = grouped_mm(hidden, down, ends)
    y: Tensor = rows[place].sum(dim=1) if compiling else _Gather.apply(rows, token, place)
    return y
