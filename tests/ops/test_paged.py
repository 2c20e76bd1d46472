import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from openmythos.ops import paged
from openmythos.ops.attention import depth_attention
from openmythos.ops.paged import (
    FLASH_PAGE,
    gather_pages,
    paged_attention,
    paged_attention_reference,
    suits_flash,
)
from tests.strategies import seeded

LENGTHS = [1, 3, 4, 5, 8, 11]
PAGE, PAGES_PER_ROW = 4, 3


def case(
    widths=((2, 6), (2, 5)), heads=4, dtype=torch.float64
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    """Queries, pools, table and lengths; pages are scattered, and NaN where nothing is stored."""
    generator = seeded()
    num_rows = len(LENGTHS)
    table = torch.randperm(num_rows * PAGES_PER_ROW, generator=generator).view(num_rows, -1)
    pools = []
    for groups, width in widths:
        pool = torch.full((table.numel() + 2, PAGE, groups, width), math.nan, dtype=dtype)
        for row, length in enumerate(LENGTHS):
            for token in range(length):
                values = torch.randn(groups, width, generator=generator, dtype=dtype)
                pool[table[row, token // PAGE], token % PAGE] = values
        pools.append(pool)
    q = torch.randn(num_rows, heads, widths[0][1], generator=generator, dtype=dtype)
    return q, tuple(pools), table, torch.tensor(LENGTHS)


def by_hand(q, pools, table, length, scale, row, head):
    """One head of one row, token by token."""
    group = head * pools[0].shape[2] // q.shape[1]
    places = [(int(table[row, t // PAGE]), t % PAGE) for t in range(int(length[row]))]
    scores = torch.stack([pools[0][page, at, group] @ q[row, head] * scale for page, at in places])
    weights = scores.softmax(dim=0)
    values = torch.stack([pools[-1][page, at, group] for page, at in places])
    return weights @ values


@pytest.mark.parametrize("widths", [((2, 6), (2, 5)), ((4, 6), (4, 6)), ((1, 7),)])
def test_reference_by_hand(widths):
    q, pools, table, length = case(widths)
    y = paged_attention_reference(q, pools, table, length, 0.3)
    assert y.shape == (*q.shape[:2], pools[-1].shape[-1])
    for row in range(len(q)):
        for head in range(q.shape[1]):
            wanted = by_hand(q, pools, table, length, 0.3, row, head)
            torch.testing.assert_close(y[row, head], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_equals_the_reference_in_fp64(dtype):
    q, pools, table, length = case()
    wanted = paged_attention_reference(q, pools, table, length, 0.3)
    narrow = tuple(pool.to(dtype) for pool in pools)
    y = paged_attention(q.to(dtype), narrow, table, length, 0.3)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_row_does_not_depend_on_the_others():
    q, pools, table, length = case()
    together = paged_attention(q, pools, table, length, 0.3)
    for row in range(len(q)):
        part = slice(row, row + 1)
        alone = paged_attention(q[part], pools, table[part, : -(-LENGTHS[row] // PAGE)],
                                length[part], 0.3)  # fmt: skip
        torch.testing.assert_close(together[part], alone)


def test_depth_attention_equals_that_of_gathered_keys():
    q, pools, table, length = case()
    own_k = torch.randn(2, len(q), 2, 1, 6, generator=seeded(1), dtype=torch.float64)
    own_v = torch.randn(2, len(q), 2, 1, 5, generator=seeded(2), dtype=torch.float64)
    exists = torch.rand(len(q), 2, generator=seeded(3)) < 0.5
    y = paged_attention(q, pools, table, length, 0.3, (own_k, own_v, exists))
    for row, number in enumerate(LENGTHS):
        k, v = (gather_pages(p, table, length)[row : row + 1, :, :number] for p in pools)
        part = [own_k[:, row : row + 1], own_v[:, row : row + 1], exists[row : row + 1]]
        wanted = depth_attention(q[row, None, :, None], k, v, None, 0.3, *part)
        torch.testing.assert_close(y[row], wanted[0, :, 0])


# --- the flash kernel, without a GPU: what it is given -------------------------------------------


def on_a_gpu(tensor: Tensor) -> Tensor:
    """A tensor of no content that says it is on a GPU."""

    class Fake(torch.Tensor):
        device = torch.device("cuda")

    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(Fake)


def test_flash_takes_half_precision_in_large_pages_only():
    q = on_a_gpu(torch.empty(3, 4, 8, dtype=torch.bfloat16))
    pool = on_a_gpu(torch.empty(5, FLASH_PAGE, 2, 8, dtype=torch.bfloat16))
    assert suits_flash(q, (pool, pool))
    assert not suits_flash(q, (pool,))
    assert not suits_flash(q, (pool, pool[..., :4]))
    assert not suits_flash(q, (pool[:, :16], pool[:, :16]))
    assert not suits_flash(q.float(), (pool.float(), pool.float()))
    assert not suits_flash(torch.empty(q.shape, dtype=q.dtype), (pool, pool))


def test_flash_is_given_the_table_and_equals_the_reference(monkeypatch):
    """The kernel, written out by its documentation, gives what the reference gives."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        assert cu_seq_k is None and max_q == 1 and max_k == PAGE * PAGES_PER_ROW
        assert cu_seq_q.tolist() == list(range(len(LENGTHS) + 1))
        assert options["enable_gqa"] and options["num_splits"] == 1
        table, length = options["block_table"], options["seqused_k"]
        assert table.dtype == length.dtype == torch.int32
        return paged_attention_reference(q, (k, v), table.long(), length, options["scale"])

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(paged, "suits_flash", lambda q, pools: True)
    q, pools, table, length = case(((2, 6), (2, 6)))
    wanted = paged_attention_reference(q, pools, table, length, 0.3)
    assert torch.equal(paged_attention(q, pools, table, length, 0.3), wanted)
