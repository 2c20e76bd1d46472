"""The experts' products: a loop over experts as reference, one grouped product as fast path.

On a CPU the grouped kernel is a loop over all experts as well, and ``SplitExperts`` is faster.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional


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


class SplitExperts:
    """The weights of all experts as separate tensors, for every loop of one forward on a CPU.

    An expert without rows costs nothing. The gradient is made once for all loops, when the last of
    them has given its share: one product an expert over the rows of all loops, written where it
    belongs, instead of one gradient as large as all experts a loop.
    """

    def __init__(self, weights: Float[Tensor, "E O I"]) -> None:
        self.weights = weights.detach()
        self.parts = self.weights.unbind()
        self._uses: list[tuple[Tensor, Tensor, list[int]]] = []  # rows in, gradient out, counts
        self._backward_pass = -1
        wanted = torch.is_grad_enabled() and weights.requires_grad
        # Every product depends on it, so that its gradient comes after those of all products.
        self.token = _Gradient.apply(weights, self) if wanted else None

    def product(self, x: Float[Tensor, "M I"], counts: list[int]) -> Float[Tensor, "M O"]:
        """As ``grouped_mm``, with the number of each expert's rows."""
        if not torch.is_grad_enabled():
            return self.multiply(x, counts, transpose=False)
        product: Tensor = _Product.apply(x, self.token, self, counts)
        return product

    def multiply(self, x: Tensor, counts: list[int], *, transpose: bool) -> Tensor:
        """Each expert's rows times its weights, transposed or not."""
        y = x.new_empty(len(x), self.weights.shape[2 if transpose else 1])
        used = [expert for expert, count in enumerate(counts) if count]
        blocks = [tensor.split([counts[expert] for expert in used]) for tensor in (x, y)]
        for expert, rows, out in zip(used, *blocks, strict=True):
            weight = self.parts[expert].to(x.dtype)
            torch.mm(rows, weight if transpose else weight.mT, out=out)
        return y

    def add_use(self, x: Tensor, grad: Tensor, counts: list[int]) -> None:
        """Keep what one product gives to the gradient."""
        current = torch._C._current_graph_task_id()
        if current != self._backward_pass:  # what an earlier one left has nothing to do with it
            self._uses.clear()
        self._backward_pass = current
        self._uses.append((x, grad, counts))

    def gradient(self) -> Float[Tensor, "E O I"]:
        """The gradient of all weights from the uses of this backward pass."""
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for x, grad, counts in self._uses:
            used = [expert for expert, count in enumerate(counts) if count]
            sizes = [counts[expert] for expert in used]
            for expert, *pair in zip(used, x.split(sizes), grad.split(sizes), strict=True):
                parts.setdefault(expert, []).append((pair[0], pair[1]))
        rare = len(parts) < len(self.parts)
        result = _lazy_zeros_like(self.weights) if rare else torch.empty_like(self.weights)
        for expert, pairs in parts.items():
            x, grad = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            if x.dtype == result.dtype:
                torch.mm(grad.mT, x, out=result[expert])
            else:
                result[expert] = grad.mT @ x
        self._uses.clear()
        return result


def _lazy_zeros_like(tensor: Tensor) -> Tensor:
    """Zeros that cost nothing until they are touched: the system makes their pages then."""
    zeros = torch.from_numpy(np.zeros(tensor.nbytes, dtype=np.uint8))
    return zeros.view(tensor.dtype).view(tensor.shape)


class _Gradient(torch.autograd.Function):
    """An empty number that stands for the weights; its gradient is theirs."""

    @staticmethod
    def forward(ctx: FunctionCtx, weights: Tensor, experts: SplitExperts) -> Tensor:
        ctx.experts = experts  # type: ignore[attr-defined]
        return weights.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.experts.gradient(), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, token: Tensor | None, experts: SplitExperts, counts: list[int]
    ) -> Tensor:
        ctx.save_for_backward(x, experts.weights)  # the weights so that a change is noticed
        ctx.experts, ctx.counts = experts, counts  # type: ignore[attr-defined]
        return experts.multiply(x, counts, transpose=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, _ = ctx.saved_tensors
        grad_x = grad_token = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.experts.multiply(grad, ctx.counts, transpose=True)
        if ctx.needs_input_grad[1]:
            ctx.experts.add_use(x, grad, ctx.counts)
            grad_token = ctx.experts.weights.new_zeros(())
        return grad_x, grad_token, None, None


def _spread(x: Tensor, token: Tensor, place: Tensor) -> Tensor:
    """Row ``token[m]`` of x for each pair m; ``place[n, k]`` is where token n's pair k went."""
    if torch.compiler.is_compiling():  # which fuses these two by itself
        return x[token]
    rows: Tensor = _Spread.apply(x, token, place)
    return rows


def _gather(rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
    """Each token's sum over its pairs, in the order of its slots; the transpose of ``_spread``.

    index_add would add in any order on a GPU, and a sum over a reordered copy takes 30 times as
    long on a CPU.
    """
    if torch.compiler.is_compiling():
        return rows[place].sum(dim=1)
    summed: Tensor = _Gather.apply(rows, token, place)
    return summed


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gathered: Tensor = _Gather.apply(grad, *ctx.saved_tensors)
        return gathered, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        return functional.embedding_bag(place, rows, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        spread: Tensor = _Spread.apply(grad, *ctx.saved_tensors)
        return spread, None, None


def _expert_mm(x: Tensor, weights: Tensor | SplitExperts, counts: Tensor) -> Tensor:
    if isinstance(weights, SplitExperts):
        return weights.product(x, counts.tolist())
    return grouped_mm(x, weights, counts.cumsum(0).to(torch.int32))


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
    gate, up = (gate_up[expert] * x[:, None, None, :]).sum(dim=-1).chunk(2, dim=-1)
    hidden = functional.silu(gate) * up * weight[..., None]
    return (down[expert] * hidden[:, :, None, :]).sum(dim=-1).sum(dim=1)


def _few(expert: Tensor, weights: Tensor) -> bool:
    compiling = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return compiling and expert.numel() <= len(weights)


def moe_experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E _ D"] | SplitExperts,
    down: Float[Tensor, "E D F"] | SplitExperts,
    counts: Int[Tensor, "E"],
) -> Float[Tensor, "N D"]:
    """Sum over each token's K experts of ``weight * down(SiLU(gate x) * up x)``.

    Tokens are sorted by expert once, so that each expert's rows are one block of a grouped product.
    ``counts`` is the number of (token, slot) pairs of each expert.
    """
    if torch.is_autocast_enabled(x.device.type):  # the grouped kernel is unknown to autocast
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(low), weight.to(low)
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            gate_up, down = gate_up.to(low), down.to(low)
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor) and _few(expert, gate_up):
        return gathered_experts(x, expert, weight, gate_up, down)
    order = expert.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    token, place = order // expert.shape[1], places.view(expert.shape)
    rows = _spread(x, token, place)
    gate, up = _expert_mm(rows, gate_up, counts).chunk(2, dim=-1)
    hidden = functional.silu(gate) * up * weight.flatten()[order, None]
    return _gather(_expert_mm(hidden, down, counts), token, place)
