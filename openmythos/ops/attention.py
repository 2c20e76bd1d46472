"""Scaled dot-product attention: the reference, the fast ways, and keys of a token's own."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen

from openmythos.ops.cpu import build as native
from openmythos.ops.double_backward import differentiable_gradients

MIN_LENGTH, MAX_LENGTH = 32, 1024  # tokens of our kernel: it keeps weights, their square in number


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
    if _suits_blocks(q, k, v, mask):
        by_token: Tensor = _BlockAttention.apply(q, k, v, mask, scale)
        return by_token.transpose(1, 2)
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


def packed_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T W"],
    spans: Int[Tensor, "N"],
    longest: int,
    scale: float,
) -> Float[Tensor, "B H T W"]:
    """Causal attention within documents, by the flash kernel of GPUs, in bf16 or fp16.

    It is torch's own kernel for sequences of unequal length: nothing is computed between documents
    and no mask is made. flex attention can do the same, but has to be compiled, and its block mask
    is made anew for every batch.

    Args:
        q: Queries of packed rows without padding.
        k: Keys.
        v: Values; narrow ones are padded, because the kernel wants equal widths.
        spans: Where each document begins, and where the last one ends, in tokens of all rows.
        longest: Tokens of the longest document.
        scale: Of the scores.

    Source: torch.nn.attention.varlen (torch 2.13).
    """
    width = v.shape[-1]
    if width < k.shape[-1]:
        v = functional.pad(v, (0, k.shape[-1] - width))
    q_flat, k_flat, v_flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    y = varlen.varlen_attn(
        q_flat,
        k_flat,
        v_flat,
        spans,
        spans,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    assert isinstance(y, Tensor)  # and not its log-sum-exp as well
    return y.unflatten(0, (q.shape[0], -1)).transpose(1, 2)[..., :width]


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


def _suits_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    if not native.eager():
        return False
    (num_rows, heads, length, width), groups = q.shape, k.shape[1]
    fits = MIN_LENGTH <= length <= MAX_LENGTH and width % 32 == 0 and v.shape[-1] % 32 == 0
    same = k.shape == (num_rows, groups, length, width) and v.shape[:3] == k.shape[:3]
    whole = heads % groups == 0 and (mask is None or mask.shape == (num_rows, 1, length, length))
    return fits and same and whole and native.takes("attention", q, k, v, mask)


class _BlockAttention(torch.autograd.Function):
    """Causal attention in blocks of queries; the result is [B, T, H, W]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        packed = [None if each is None else _side_by_side(each) for each in (q, k, v, mask)]
        kernel, keep = torch.ops.openmythos_attention.forward, any(ctx.needs_input_grad)
        y, weights = kernel(*packed, scale, keep)
        ctx.save_for_backward(q, k, v, mask, weights)
        ctx.scale = scale
        by_token: Tensor = y
        return by_token

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            attend = lambda q, k, v: attention_reference(q, k, v, mask, ctx.scale)  # noqa: E731
            again = differentiable_gradients(ctx, attend, (q, k, v), grad.transpose(1, 2))
            return (*again, None, None)
        kernel = torch.ops.openmythos_attention.backward
        packed = [_side_by_side(each) for each in (grad.transpose(1, 2), q, k, v)]
        found = kernel(*packed, weights, ctx.scale)
        return (*(each.transpose(1, 2) for each in found), None, None)


def _side_by_side(x: Tensor) -> Tensor:
    """x, copied unless its channels are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
