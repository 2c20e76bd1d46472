"""Scaled dot-product attention: the reference, the fast ways, and keys of a token's own."""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

BLOCK = 64  # queries of a block
MAX_BLOCK_LENGTH = 1024  # tokens; a block's kept weights grow with the square of the length


def attention_reference(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S W"],
    mask: Float[Tensor, "B 1 T S"] | None,
    scale: float,
) -> Float[Tensor, "B H T W"]:
    """Softmax attention written out. ``mask`` is added to the scores; None means causal."""
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is None:
        num_q, num_k = scores.shape[-2:]
        visible = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).tril(num_k - num_q)
        scores = scores.masked_fill(~visible, float("-inf"))
    else:
        scores = scores + mask
    return scores.softmax(dim=-1) @ v


def attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S W"],
    mask: Float[Tensor, "B 1 T S"] | None,
    scale: float,
) -> Float[Tensor, "B H T W"]:
    """As the reference, in one fused call; on a CPU in blocks, up to their length.

    ``mask`` hides later keys too: with as many queries as keys it has nothing above its diagonal.
    Without a mask T must be 1 or S: torch aligns ``is_causal`` at the top left, which is wrong for
    a chunk that follows a cache. One query is grouped by kv head: the heads of a group are the rows
    of one small product. Narrow values are padded: torch's fast kernels want equal widths.
    """
    num_q, num_k = q.shape[2], k.shape[2]
    if mask is None and num_q not in (1, num_k):
        raise ValueError(f"{num_q} queries on {num_k} keys need a mask")
    if _suits_blocks(q, k):
        blocks: Tensor = _BlockAttention.apply(q, k, v, mask, scale)
        return blocks
    width, single = v.shape[-1], num_q == 1
    if width < k.shape[-1]:
        v = functional.pad(v, (0, k.shape[-1] - width))
    y = functional.scaled_dot_product_attention(
        q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]) if single else q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and not single,
        scale=scale,
        enable_gqa=not single and q.shape[1] != k.shape[1],
    )
    return y.reshape(*q.shape[:3], -1)[..., :width]


def depth_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S W"],
    mask: Float[Tensor, "B 1 T S"] | None,
    scale: float,
    own_k: Float[Tensor, "R B G T K"],
    own_v: Float[Tensor, "R B G T W"],
    visible: Bool[Tensor, "B R"],
) -> Float[Tensor, "B H T W"]:
    """Attention over the sequence and R further keys of each token's own, in one softmax.

    No fused kernel takes keys that belong to one query, so the products are written out.

    Source: MoDA (arXiv 2603.15619): softmax([q K; q K_depth]) [V; V_depth].
    """
    (num_rows, groups, num_k), num_q = k.shape[:3], q.shape[2]
    scores = q.reshape(num_rows, groups, -1, q.shape[-1]) @ k.mT * scale
    scores = scores.view(num_rows, groups, -1, num_q, num_k)
    if mask is None:
        causal = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).tril(num_k - num_q)
        scores = scores.masked_fill(~causal, float("-inf"))
    else:
        scores = scores + mask[:, :, None]
    by_token = q.unflatten(1, (groups, -1)).transpose(2, 3)  # [B G T heads K]
    own = (by_token @ own_k.permute(1, 2, 3, 4, 0) * scale).transpose(2, 3)
    own = own.masked_fill(~visible[:, None, None, None], float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.cat((scores, own), dim=-1).softmax(dim=-1, dtype=wide).to(v.dtype)
    past, own = weights.split((num_k, len(own_k)), dim=-1)
    y = (past.flatten(2, 3) @ v).view(num_rows, groups, -1, num_q, v.shape[-1])
    y = y + (own.transpose(2, 3) @ own_v.permute(1, 2, 3, 0, 4)).transpose(2, 3)
    return y.flatten(1, 2)


def _suits_blocks(q: Tensor, k: Tensor) -> bool:
    plain = q.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    fits = BLOCK < q.shape[2] <= MAX_BLOCK_LENGTH and q.shape[2] == k.shape[2]
    return fits and plain and q.device.type == "cpu"


def _blocks(length: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, length, BLOCK), length]))


class _BlockAttention(torch.autograd.Function):
    """Causal attention in blocks of queries, each on the keys that it may see, for CPUs.

    At training lengths that is 1.4 to 1.8 times as fast as torch's fused kernel for CPUs, forward
    and backward. Heads of a group are rows of one product: [B G] matrices of [heads block, keys].
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        (num_rows, groups, length), width = k.shape[:3], v.shape[-1]
        grouped = q.unflatten(1, (groups, -1))  # [B G heads T K]
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        y = q.new_empty(*grouped.shape[:-1], width)
        kept = []
        hidden = q.new_full((BLOCK, BLOCK), float("-inf")).triu(1) if mask is None else None
        for start, stop in _blocks(length):
            queries = (grouped[:, :, :, start:stop] * scale).reshape(len(keys), -1, q.shape[-1])
            scores = torch.bmm(queries, keys[:, :stop].mT)
            by_head = scores.view(num_rows, groups, -1, stop - start, stop)
            if hidden is not None:
                by_head[..., start:] += hidden[: stop - start, : stop - start]
            elif mask is not None:
                by_head += mask[:, :, None, start:stop, :stop]
            weights = scores.softmax(dim=-1)
            block = torch.bmm(weights, values[:, :stop])
            y[:, :, :, start:stop] = block.view(*by_head.shape[:-1], width)
            if any(ctx.needs_input_grad):  # type: ignore[attr-defined]
                kept += [queries, weights]
        ctx.save_for_backward(keys, values, *kept)
        ctx.shapes, ctx.scale = (q.shape, k.shape, v.shape), scale  # type: ignore[attr-defined]
        return y.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, *kept = ctx.saved_tensors
        q_shape, k_shape, v_shape = ctx.shapes
        groups, length = k_shape[1:3]
        grad = grad.unflatten(1, (groups, -1))
        grad_q = grad.new_empty(*grad.shape[:-1], q_shape[-1])
        grad_k = grad_v = None
        blocks = zip(_blocks(length), kept[::2], kept[1::2], strict=True)
        for (start, stop), queries, weights in reversed(list(blocks)):
            grad_y = grad[:, :, :, start:stop].reshape(len(keys), -1, v_shape[-1])
            grad_weights = torch.bmm(grad_y, values[:, :stop].mT)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            block = torch.bmm(grad_scores, keys[:, :stop])
            target = grad_q[:, :, :, start:stop]
            torch.mul(block.view(target.shape), ctx.scale, out=target)
            if grad_k is None or grad_v is None:  # the last block sees all keys
                grad_k = torch.bmm(grad_scores.mT, queries)
                grad_v = torch.bmm(weights.mT, grad_y)
                continue
            grad_k[:, :stop].baddbmm_(grad_scores.mT, queries)
            grad_v[:, :stop].baddbmm_(weights.mT, grad_y)
        assert grad_k is not None
        assert grad_v is not None
        return grad_q.flatten(1, 2), grad_k.view(k_shape), grad_v.view(v_shape), None, None
