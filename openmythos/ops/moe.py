"""The routed experts' matrix products: a loop over experts as reference, grouped products.

On a CPU torch's grouped kernel is a loop over all experts; ``LoopedExperts`` is faster there.
A pair below is a (token, slot) pair: slot k of a token is the k-th of its K chosen experts.
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
    """Rows ``ends[e-1]:ends[e]`` of x times the transposed weights of expert e, for all e."""
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        parts.append(x[start:end] @ weights[expert].T)
        start = end
    return torch.cat(parts)


def grouped_mm(
    x: Float[Tensor, "M I"], weights: Float[Tensor, "E O I"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "M O"]:
    """As the reference, by torch's kernel, except in fp64 or if rows are not 16-byte multiples."""
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


# torch.compile supports grouped_mm in bf16 only; as an opaque operator it works in every dtype.
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
    # The gradients are written out, because autograd does not record inside an opaque operator.
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
    """The M pairs of a batch sorted by expert, so that each expert's pairs are one block."""

    order: Int[Tensor, "M"]  # the pair at place m, numbered token * K + slot
    token: Int[Tensor, "M"]  # its token
    ends: Int[Tensor, "E"]  # one past the last place of each expert's block

    @cached_property
    def blocks(self) -> list[tuple[int, slice]]:
        """Each expert that has pairs, with the slice of its block."""
        bounds = pairwise([0, *self.ends.tolist()])
        return [(expert, slice(*pair)) for expert, pair in enumerate(bounds) if pair[0] < pair[1]]


def sorted_pairs(
    expert: Int[Tensor, "N K"], counts: Int[Tensor, "E"]
) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"], Int[Tensor, "E"]]:
    """The fields of ``Pairs``, from each token's experts and the number of pairs per expert.

    A tuple, because torch.compile cannot trace ``Pairs``.
    """
    order = expert.flatten().argsort(stable=True)
    return order, order // expert.shape[1], counts.cumsum(0)


class LoopedExperts:
    """The routed experts for all loops of one forward, on a CPU.

    Experts without tokens cost nothing. The gradient of the weights is computed once per backward,
    after the backward of all loops: one product per expert over the tokens of all loops, written
    into one tensor. Autograd alone would make a tensor as large as all experts per loop.
    """

    def __init__(self, gate_up: Float[Tensor, "E _ D"], down: Float[Tensor, "E D F"]) -> None:
        self._weights = _LoopedWeights(gate_up.detach(), down.detach())
        wanted = torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad)
        # An input of every loop's Function: this autograd edge makes the backward of ``_Gradient``
        # run after the backward of all loops.
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
            ValueError: Shapes that do not match, or counts whose sum is not the number of pairs.
        """
        width, num_pairs = self._weights.down.shape[1], int(counts.sum())
        fits = x.shape == (len(expert), width) and expert.shape == weight.shape
        if not fits or num_pairs != expert.numel():
            shapes = f"x {(*x.shape,)}, expert {(*expert.shape,)}, weight {(*weight.shape,)}"
            raise ValueError(f"{shapes}, {num_pairs} counted: they do not fit width {width}")
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(low), weight.to(low)
        pairs = Pairs(*sorted_pairs(expert, counts))
        y: Tensor = _Experts.apply(x, weight, self._token, self._weights, pairs)
        return y


class _LoopedWeights:
    """The weights of all experts, and what each loop's backward stores for their gradient."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down = gate_up, down
        self._uses: list[tuple[Pairs, Tensor, Tensor, Tensor, Tensor]] = []
        self._backward_pass = -1

    def add_use(self, pairs: Pairs, x: Tensor, inner: Tensor, hidden: Tensor, y: Tensor) -> None:
        """Store one loop's inputs of both products and the gradients of their outputs.

        ``x`` and ``hidden`` are the inputs of ``gate_up`` and ``down``; ``inner`` and ``y`` are the
        gradients of the outputs.
        """
        current = torch._C._current_graph_task_id()
        if current != self._backward_pass:  # drop what another backward pass has left
            self._uses.clear()
        self._backward_pass = current
        self._uses.append((pairs, x, inner, hidden, y))

    def gradients(self, *wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """The wanted gradients of ``gate_up`` and ``down``, from all loops of this backward."""
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
    """A scalar zero that depends on the weights in the autograd graph.

    Its backward returns the weights' gradients, which the loops have stored in ``weights``.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor, down: Tensor, weights: _LoopedWeights) -> Tensor:
        ctx.weights = weights  # type: ignore[attr-defined]
        return gate_up.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.weights.gradients(*ctx.needs_input_grad[:2]), None)


class _Experts(torch.autograd.Function):
    """The experts of one loop; ``token`` is the scalar of ``_Gradient``."""

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
        # The weights are saved too, so that autograd detects in-place changes of them.
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
    """Row ``source[m]`` of x times the weights W of pair m's expert; ``transposed``: times W^T."""
    if has_native(weights, x):
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
    """As ``_multiply`` with row m for pair m, summed over the pairs of each token."""
    if has_native(weights, x):
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
    """Per expert, the sum of ``left^T right`` over its pairs in all loops.

    ``left_rows`` and ``right_rows`` give the row of each pair, by loop.
    """
    result = _lazy_zeros_like(weights)
    if has_native(weights, *left, *right):
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


def has_native(weights: Tensor, *tensors: Tensor) -> bool:
    """Whether our kernel takes these tensors; it needs widths that are multiples of 32."""
    whole = weights.shape[1] % 32 == 0 and weights.shape[2] % 32 == 0 and weights.is_contiguous()
    return whole and native.takes("experts", weights, *tensors)


def _lazy_zeros_like(tensor: Tensor) -> Tensor:
    """Zeros whose memory the system allocates only when it is written."""
    zeros = torch.from_numpy(np.zeros(tensor.nbytes, dtype=np.uint8))
    return zeros.view(tensor.dtype).view(tensor.shape)


class Spread(torch.autograd.Function):
    """Row ``token[m]`` of x for each pair m; ``place[n, k]`` is the place of token n's pair k."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gathered: Tensor = Gather.apply(grad, *ctx.saved_tensors)
        return gathered, None, None


class Gather(torch.autograd.Function):
    """The sum over each token's pairs, always in the order of its slots; transpose of ``Spread``.

    The order of additions of ``index_add`` is not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        return functional.embedding_bag(place, rows, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        spread: Tensor = Spread.apply(grad, *ctx.saved_tensors)
        return spread, None, None


def gathered_experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E _ D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """As ``moe_experts``, for few tokens: each pair is computed by itself, without sorting.

    For compiled code, which reads the weights of the chosen experts in place, and under ``vmap``,
    where no counts can be read; eager would copy them.
    """
    hidden = swiglu((gate_up[expert] * x[:, None, None, :]).sum(dim=-1)) * weight[..., None]
    return (down[expert] * hidden[:, :, None, :]).sum(dim=-1).sum(dim=1)


def moe_experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    counts: Int[Tensor, "E"],
    gate_up: Float[Tensor, "E _ D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Sum over each token's K experts of ``weight * down(SiLU(gate x) * up x)``.

    Pairs are sorted by expert, so that each expert's rows are one block of a grouped product.

    Args:
        x: One row per token.
        expert: The experts of each token.
        weight: The weight of each expert's output.
        counts: The number of pairs per expert.
        gate_up: Gate and up projections of all experts, as one matrix per expert.
        down: Down projections of all experts.
    """
    if torch.is_autocast_enabled(x.device.type):  # autocast does not cast for the grouped kernel
        low = torch.get_autocast_dtype(x.device.type)
        x, weight, gate_up, down = (each.to(low) for each in (x, weight, gate_up, down))
    compiling = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if native.vmapped() or (compiling and expert.numel() <= len(gate_up)):
        return gathered_experts(x, expert, weight, gate_up, down)
    order, token, ends = sorted_pairs(expert, counts)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    place, ends = places.view(expert.shape), ends.to(torch.int32)
    eager = native.eager()  # the compiler fuses both indexings; torch.func cannot take a Function
    rows: Tensor = Spread.apply(x, token, place) if eager else x[token]
    hidden = swiglu(grouped_mm(rows, gate_up, ends)) * weight.flatten()[order, None]
    rows = grouped_mm(hidden, down, ends)
    y: Tensor = Gather.apply(rows, token, place) if eager else rows[place].sum(dim=1)
    return y
