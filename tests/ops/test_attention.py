import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from openmythos.ops.attention import (
    MAX_LENGTH,
    MIN_LENGTH,
    _suits_blocks,
    attention,
    attention_reference,
    depth_attention,
    packed_attention,
)
from tests.strategies import random_model, random_tokens, seeded, small_config


def case(num_q: int, num_k: int, dtype: torch.dtype = torch.float64):
    generator = seeded()
    q = torch.randn(2, 4, num_q, 6, generator=generator, dtype=dtype)
    k = torch.randn(2, 2, num_k, 6, generator=generator, dtype=dtype)
    v = torch.randn(2, 2, num_k, 5, generator=generator, dtype=dtype)
    return q, k, v


@pytest.mark.parametrize(("num_q", "num_k"), [(5, 5), (1, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_equals_the_reference_when_causal(num_q, num_k, dtype):
    q, k, v = case(num_q, num_k, dtype)
    torch.testing.assert_close(
        attention(q, k, v, None, 0.3), attention_reference(q, k, v, None, 0.3)
    )


def test_fused_equals_the_reference_with_a_mask():
    q, k, v = case(3, 5)
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
    mask[0, 0, 0, 2:] = mask[1, 0, :, 0] = float("-inf")
    torch.testing.assert_close(
        attention(q, k, v, mask, 0.3), attention_reference(q, k, v, mask, 0.3)
    )


def test_the_reference_by_hand():
    q, k, v = case(3, 3)
    for head in range(4):
        scores = q[0, head] @ k[0, head // 2].T * 0.3
        scores[torch.ones(3, 3).triu(1).bool()] = float("-inf")
        wanted = scores.softmax(dim=-1) @ v[0, head // 2]
        torch.testing.assert_close(attention_reference(q, k, v, None, 0.3)[0, head], wanted)


def fast_case(length: int, *, side_by_side: bool) -> list[torch.Tensor]:
    """Two query heads a group, values of another width; channels or tokens side by side."""
    shapes = [(2, 4, 64), (2, 2, 64), (2, 2, 32)]
    generator = seeded(length)
    made = []
    for rows, heads, width in shapes:
        if side_by_side:
            tensor = torch.randn(rows, length, heads, width, generator=generator).transpose(1, 2)
        else:
            tensor = torch.randn(rows, heads, width, length, generator=generator).mT
        made.append(tensor.requires_grad_())
    return made


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [MIN_LENGTH, 47, 48, 49, 96, 151, 300])
def test_our_kernel_and_its_gradients_equal_the_reference(compiler, length, masked, side_by_side):
    """Up to and across the borders of blocks and tiles."""
    tensors = fast_case(length, side_by_side=side_by_side)
    mask = None
    if masked:  # two packed documents a row, of other lengths in each
        documents = torch.arange(length) >= torch.tensor([[length // 3], [length - 1]])
        visible = (documents[:, :, None] == documents[:, None, :]).tril()
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None]
    got, wanted = (way(*tensors, mask, 0.3) for way in (attention, attention_reference))
    assert _suits_blocks(*tensors, mask)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(got.shape, generator=seeded(2))
    gradients = (torch.autograd.grad(y, tensors, upstream) for y in (got, wanted))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_masked_key_counts_for_nothing():
    """Packed documents give what each gives alone, and a prefix what it gives by itself."""
    q, k, v = (tensor.detach() for tensor in fast_case(60, side_by_side=True))
    visible = (torch.arange(60) // 20)[:, None] == torch.arange(60) // 20
    mask = torch.zeros(60, 60).masked_fill(~visible.tril(), -torch.inf).expand(2, 1, 60, 60)
    documents = [
        attention(*(each[:, :, start : start + 20] for each in (q, k, v)), None, 0.3)
        for start in (0, 20, 40)
    ]
    together = attention(q, k, v, mask, 0.3)
    torch.testing.assert_close(together, torch.cat(documents, dim=2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        attention(q, k, v, None, 0.3)[:, :, :50],
        attention(*(each[:, :, :50] for each in (q, k, v)), None, 0.3),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("length", "width", "dtype"),
    [
        (MIN_LENGTH - 1, 32, torch.float32),
        (MAX_LENGTH + 1, 32, torch.float32),
        (64, 24, torch.float32),
        (64, 32, torch.float64),
    ],
)
def test_what_our_kernel_does_not_take_is_left_to_torch(length, width, dtype):
    q = torch.randn(1, 1, length, width, dtype=dtype)
    assert not _suits_blocks(q, q, q, None)
    wanted = attention_reference(q, q, q, None, 0.3)
    torch.testing.assert_close(attention(q, q, q, None, 0.3), wanted, rtol=1e-4, atol=1e-5)


def test_operands_of_other_shapes_are_left_to_torch():
    q, k, v = fast_case(64, side_by_side=True)
    mask = torch.zeros(1, 1, 64, 64)
    assert _suits_blocks(q, k, v, mask.expand(2, 1, 64, 64))
    for other in (mask, mask.expand(2, 4, 64, 64)):
        assert not _suits_blocks(q, k, v, other)
    assert not _suits_blocks(q[:, :3], k, v, None)  # three heads on two groups
    assert not _suits_blocks(q, k[..., :32], v, None)
    assert not _suits_blocks(q, k[:1], v[:1], None)
    with pytest.raises(RuntimeError):
        attention(q[:, :3], k, v, None, 0.3)


def test_without_gradients_the_weights_are_not_kept():
    q, k, v = fast_case(100, side_by_side=True)
    kernel = torch.ops.openmythos_attention.forward
    (y, kept), (same, none) = (kernel(q, k, v, None, 0.3, keep) for keep in (True, False))
    assert torch.equal(y, same)
    assert kept.numel() > 2 * 4 * 100 * 50
    assert none.numel() == 0


def test_a_chunk_after_a_cache_needs_a_mask():
    with pytest.raises(ValueError, match="3 queries on 5 keys need a mask"):
        attention(*case(3, 5), None, 0.3)


# --- keys of a token's own -----------------------------------------------------------------------


def own_case(num_own: int, num_q: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(1)
    k = torch.randn(num_own, 2, 2, num_q, 6, generator=generator, dtype=torch.float64)
    v = torch.randn(num_own, 2, 2, num_q, 5, generator=generator, dtype=torch.float64)
    return k, v


@pytest.mark.parametrize(("num_q", "num_k"), [(5, 5), (1, 5), (1, 1), (3, 5)])
def test_no_earlier_loop_is_plain_attention(num_q, num_k):
    q, k, v = case(num_q, num_k)
    mask = None
    if num_q == 3:
        mask = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
        mask[0, 0, 0, 2:] = mask[1, 0, :, 0] = float("-inf")
    none = torch.zeros(2, 3, dtype=torch.bool)
    got = depth_attention(q, k, v, mask, 0.3, *own_case(3, num_q), none)
    torch.testing.assert_close(got, attention(q, k, v, mask, 0.3))
    empty = (own[:0] for own in own_case(3, num_q))
    got = depth_attention(q, k, v, mask, 0.3, *empty, none[:, :0])
    torch.testing.assert_close(got, attention(q, k, v, mask, 0.3))


@pytest.mark.parametrize("padded", [False, True])
def test_earlier_loops_are_keys_of_their_own_token_alone(padded):
    """For every token, torch's attention on its visible keys and its own, side by side."""
    (q, k, v), (own_k, own_v) = case(4, 4), own_case(3, 4)
    visible = torch.tensor([[True, False, False], [True, True, True]])
    mask = None
    if padded:
        mask = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
        mask = mask.masked_fill(~torch.ones(4, 4).tril().bool(), float("-inf"))
        mask[1, 0, 1:, 0] = float("-inf")
    tensors = [tensor.requires_grad_() for tensor in (q, k, v, own_k, own_v)]
    got = depth_attention(q, k, v, mask, 0.3, own_k, own_v, visible)
    rows = []
    for row in range(2):
        shown, columns = visible[row], []
        for t in range(4):
            past = slice(1 if padded and row == 1 and t > 0 else 0, t + 1)
            keys = torch.cat((k[row, :, past], own_k[shown, row, :, t].transpose(0, 1)), dim=1)
            values = torch.cat((v[row, :, past], own_v[shown, row, :, t].transpose(0, 1)), dim=1)
            columns.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q[row : row + 1, :, t : t + 1],
                    keys[None].repeat_interleave(2, dim=1),
                    values[None].repeat_interleave(2, dim=1),
                    scale=0.3,
                )
            )
        rows.append(torch.cat(columns, dim=2))
    wanted = torch.cat(rows)
    torch.testing.assert_close(got, wanted)
    weight = torch.randn(got.shape, dtype=torch.float64, generator=seeded(2))
    grads = torch.autograd.grad((got * weight).sum(), tensors)
    for grad, expected in zip(
        grads, torch.autograd.grad((wanted * weight).sum(), tensors), strict=True
    ):
        torch.testing.assert_close(grad, expected)
    assert not grads[3][1:, 0].any()  # hidden keys get no gradient


def test_results_may_be_changed_in_place_and_fake_tensors_are_left_to_torch(compiler):
    q = torch.randn(1, 2, 40, 32, requires_grad=True)
    attention(q, q, q, None, 1.0).mul_(2).sum().backward()
    with FakeTensorMode():
        assert attention(*[torch.zeros(1, 2, 64, 32)] * 3, None, 1.0).shape == (1, 2, 64, 32)


def each_document_alone(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    """What torch's kernel for GPUs computes, document by document."""
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32
    assert (window_size, enable_gqa) == ((-1, 0), True)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    parts = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
        parts.append(attention_reference(q, k, v, None, scale)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (4, 2, 8), (4, 2, 5)])
def test_packed_documents_equal_a_document_mask(heads, groups, width, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", each_document_alone)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 6, 6, 6, 6, 6]])
    draw = lambda n, w: torch.randn(2, n, 6, w, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(heads, 8), draw(groups, 8), draw(groups, width)
    spans = torch.tensor([0, 3, 5, 6, 7, 12], dtype=torch.int32)
    got = packed_attention(q, k, v, spans, 5, 0.3)
    visible = (documents[:, :, None] == documents[:, None]).tril()
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~visible[:, None], -math.inf)
    torch.testing.assert_close(got, attention_reference(q, k, v, mask, 0.3))


def test_a_context_with_lengths_calls_the_packed_kernel_in_half_precision(monkeypatch):
    calls = []

    def counted(*given, **options):
        calls.append(given[0].dtype)
        return each_document_alone(*given, **options)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    config = small_config()
    model = random_model(config).to(torch.bfloat16)
    tokens = random_tokens(config, 1, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    masked = model.context(tokens, documents=documents)
    packed = replace(masked, lengths=((3, 3),), masks={})
    with torch.no_grad():
        wanted, got = (model(tokens, num_loops=2, ctx=ctx).logits for ctx in (masked, packed))
    assert calls == [torch.bfloat16] * (1 + 2 * 2 + 1)
    assert packed.masks.keys() == {"spans"}  # and no mask
    assert (got - wanted).norm() / wanted.norm() < 0.02
