"""Attention of single queries to keys and values in pages: the reference and the fast paths.

A pool ``[P page heads dim]`` holds pages of ``page`` tokens. A row's table lists its pages in the
order of its tokens, of which the first ``length`` exist.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.ops.attention import attention, depth_attention

Pools = tuple[Float[Tensor, "P page _ _"], ...]  # keys and values, or one of latents
Own = tuple[Float[Tensor, "R N G 1 K"], Float[Tensor, "R N G 1 W"], Bool[Tensor, "N R"]]

FLASH_PAGE = 256  # tokens: pages of torch's kernel for GPUs are multiples of it


def gather_pages(
    pool: Float[Tensor, "P page G K"], table: Int[Tensor, "N M"], length: Int[Tensor, "N"]
) -> Float[Tensor, "N G S K"]:
    """The rows' tokens side by side, zeros past each row's length: other rows' pages hold NaN."""
    tokens = pool[table].flatten(1, 2)
    beyond = torch.arange(tokens.shape[1], device=length.device) >= length[:, None]
    return tokens.masked_fill_(beyond[:, :, None, None], 0).transpose(1, 2)


def paged_attention_reference(
    q: Float[Tensor, "N H K"],
    pools: Pools,
    table: Int[Tensor, "N M"],
    length: Int[Tensor, "N"],
    scale: float,
    own: Own | None = None,
) -> Float[Tensor, "N H W"]:
    """Gather the pages, then attend; see ``paged_attention``."""
    k, v = (gather_pages(pool, table, length).to(q.dtype) for pool in (pools[0], pools[-1]))
    hidden = torch.arange(k.shape[2], device=length.device) >= length[:, None]
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
    if own is None:
        return attention(q[:, :, None], k, v, mask, scale)[:, :, 0]
    own_k, own_v = (tensor.to(q.dtype) for tensor in own[:2])
    return depth_attention(q[:, :, None], k, v, mask, scale, own_k, own_v, own[2])[:, :, 0]


def paged_attention(
    q: Float[Tensor, "N H K"],
    pools: Pools,
    table: Int[Tensor, "N M"],
    length: Int[Tensor, "N"],
    scale: float,
    own: Own | None = None,
    *,
    v_dim: int | None = None,
    native: bool = False,
) -> Float[Tensor, "N H W"]:
    """Attention of one query per row to the row's pages, by a fast path where there is one.

    On GPUs in bf16 and fp16 it is torch's flash kernel, which reads the pages where they lie;
    splitting a row's keys between blocks is off, so that a row does not depend on the others.

    Args:
        q: Queries; every row attends to at least one token.
        pools: Keys and values or, for latents that serve as both, one tensor.
        table: Page numbers in the pools; those past the row's length do not matter.
        length: Number of tokens of each row.
        scale: Factor of the scores.
        own: Keys and values of each token's own earlier loops, and whether each row has run that
            loop, for depth attention.
        v_dim: Only the first ``v_dim`` channels are values; None: all.
        native: Use our kernel for CPUs, as ``ops.cpu.paged.beats_gather`` says for these pools.

    Source: torch.nn.attention.varlen (torch 2.13).
    """
    width = pools[-1].shape[-1] if v_dim is None else v_dim
    if own is None and native:
        kernel = torch.ops.openmythos_paged.attend
        y: Tensor = kernel(q.contiguous(), pools[0], pools[-1], table, length, scale, width)
        return y
    if own is None and suits_flash(q, pools):
        return _flash(q, pools, table, length, scale)[..., :width]
    return paged_attention_reference(q, pools, table, length, scale, own)[..., :width]


def fill_pages(
    pool: Float[Tensor, "P page G K"],
    tokens: Int[Tensor, "N 4"],
    first: int,
    layers: int,
    num_pages: int,
    *,
    native: bool = False,
) -> None:
    """Copy what layers stored of tokens in one slot to the slots after it.

    Slot s of layer l has the pages from ``(first + s * layers + l) * num_pages`` on.

    Args:
        pool: Changed in place.
        tokens: Of each its page, its place in the page, its slot, and the last slot to copy to; on
            the host.
        first: The slot of the first layer.
        layers: Number of layers.
        num_pages: Number of pages of a slot.
        native: Use our kernel for CPUs.
    """
    if native:
        torch.ops.openmythos_paged.fill(pool, tokens, first, layers, num_pages)
        return
    copies = [
        (*((first + s * layers + layer) * num_pages + page for s in (slot, old)), place)
        for page, place, old, last in tokens.tolist()
        for slot in range(old + 1, last + 1)
        for layer in range(layers)
    ]
    if copies:
        new, source, place = torch.tensor(copies, device=pool.device).unbind(1)
        pool[new, place] = pool[source, place]


def suits_flash(q: Float[Tensor, "N H K"], pools: Pools) -> bool:
    """Whether torch's flash kernel for GPUs takes these: half precision, keys as wide as values."""
    half = q.dtype in (torch.bfloat16, torch.float16) and q.dtype == pools[0].dtype
    equal = len(pools) == 2 and pools[0].shape == pools[1].shape
    return q.device.type == "cuda" and half and equal and pools[0].shape[1] % FLASH_PAGE == 0


def _flash(q: Tensor, pools: Pools, table: Tensor, length: Tensor, scale: float) -> Tensor:
    from torch.nn.attention import varlen  # imports the compiler

    k, v = pools
    y = varlen.varlen_attn(
        q,
        k,
        v,
        torch.arange(len(q) + 1, dtype=torch.int32, device=q.device),
        None,
        1,
        table.shape[1] * pools[0].shape[1],
        scale=scale,
        enable_gqa=True,
        seqused_k=length.to(torch.int32),
        block_table=table.to(torch.int32),
        num_splits=1,
    )
    assert isinstance(y, Tensor)  # not a tuple with the log-sum-exp
    return y
