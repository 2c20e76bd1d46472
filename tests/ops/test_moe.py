import pytest
import torch
from torch.nn import functional

from openmythos.ops.moe import (
    SplitExperts,
    gathered_experts,
    grouped_mm,
    grouped_mm_reference,
    moe_experts,
)
from tests.strategies import seeded, unchecked


def case(num_experts: int, num_in: int, num_out: int, counts: list[int], dtype: torch.dtype):
    generator = seeded(3)
    x = torch.randn(sum(counts), num_in, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(num_experts, num_out, num_in, generator=generator).to(dtype)
    return x, weights.requires_grad_(), torch.tensor(counts).cumsum(0).to(torch.int32)


COUNTS = [[3, 2, 4], [0, 9, 0], [0, 0, 5], [1, 0, 0]]
SHAPES = [(8, 16), (5, 7), (8, 6), (4, 4)]  # the second and third are not whole 16 bytes


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_mm_equals_its_reference_forward_and_backward(counts, num_in, num_out, dtype):
    x, weights, ends = case(3, num_in, num_out, counts, dtype)
    got, wanted = grouped_mm(x, weights, ends), grouped_mm_reference(x, weights, ends)
    torch.testing.assert_close(got, wanted)
    pull = torch.randn(got.shape, generator=seeded(4)).to(dtype)
    ours = torch.autograd.grad(got, (x, weights), pull)
    theirs = torch.autograd.grad(wanted, (x, weights), pull)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouped_mm_in_low_precision(dtype):
    x, weights, ends = case(3, 8, 16, [3, 0, 4], dtype)
    wanted = grouped_mm_reference(x.float(), weights.float(), ends)
    got = grouped_mm(x, weights, ends)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_in", "num_out"), [(8, 16), (5, 7)])
def test_grouped_mm_under_the_compiler(num_in, num_out, dtype):
    with unchecked():
        compiled = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")
        x, weights, ends = case(3, num_in, num_out, [3, 0, 4], dtype)
        got, wanted = compiled(x, weights, ends), grouped_mm_reference(x, weights, ends)
        torch.testing.assert_close(got, wanted)
        ours = torch.autograd.grad(got.square().sum(), (x, weights))
        theirs = torch.autograd.grad(wanted.square().sum(), (x, weights))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)
    torch._dynamo.reset()


def experts_reference(x, expert, weight, gate_up, down):
    out = torch.zeros_like(x)
    for n, token in enumerate(x):
        for index, share in zip(expert[n], weight[n], strict=True):
            gate, up = (gate_up[index] @ token).chunk(2)
            out[n] = out[n] + share * (down[index] @ (functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 5])
def test_moe_experts_equals_a_loop_forward_and_backward(width, dtype):
    generator = seeded(0)
    num_tokens, dim, num_experts = 7, 8, 5
    x = torch.randn(num_tokens, dim, generator=generator).to(dtype).requires_grad_()
    gate_up = (
        torch.randn(num_experts, 2 * width, dim, generator=generator).to(dtype).requires_grad_()
    )
    down = torch.randn(num_experts, dim, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.rand(num_tokens, 2, generator=generator).to(dtype).requires_grad_()
    expert = torch.tensor([[0, 4], [4, 0], [1, 4], [4, 1], [0, 1], [0, 4], [1, 0]])  # none to 2, 3
    counts = torch.bincount(expert.flatten(), minlength=num_experts)
    leaves = (x, weight, gate_up, down)
    got = moe_experts(x, expert, weight, gate_up, down, counts)
    wanted = experts_reference(x, expert, weight, gate_up, down)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    gathered = gathered_experts(x, expert, weight, gate_up, down)
    torch.testing.assert_close(gathered, wanted, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(got.square().sum(), leaves)
    theirs = torch.autograd.grad(wanted.square().sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    assert not ours[2][2].any()


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_split_experts_equal_the_reference_forward_and_backward(counts, dtype):
    """Two uses, as by two loops: the gradient is that of both."""
    x, weights, ends = case(3, 5, 7, counts, dtype)
    other_counts, generator = [2, 0, 1], seeded(5)
    other = torch.randn(3, 5, generator=generator).to(dtype).requires_grad_()
    other_ends = torch.tensor(other_counts).cumsum(0).to(torch.int32)
    experts = SplitExperts(weights)
    got = torch.cat((experts.product(x, counts), experts.product(other, other_counts)))
    wanted = torch.cat(
        (grouped_mm_reference(x, weights, ends), grouped_mm_reference(other, weights, other_ends))
    )
    torch.testing.assert_close(got, wanted)
    pull = torch.randn(got.shape, generator=seeded(4)).to(dtype)
    ours = torch.autograd.grad(got, (x, other, weights), pull)
    theirs = torch.autograd.grad(wanted, (x, other, weights), pull)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


def test_split_experts_count_each_backward_pass_alone():
    """A pass that stops before the weights, then one that reaches them, then it again."""
    x, weights, _ = case(3, 5, 7, [3, 2, 4], torch.float64)
    experts = SplitExperts(weights)
    first = experts.product(x, [3, 2, 4])
    loss = experts.product(first[:, :5], [4, 4, 1]).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    torch.autograd.grad(first.sum(), weights, retain_graph=True)
    once, again = (torch.autograd.grad(loss, weights, retain_graph=True)[0] for _ in range(2))
    ends = [torch.tensor(counts).cumsum(0) for counts in ([3, 2, 4], [4, 4, 1])]
    inner = grouped_mm_reference(x, weights, ends[0])[:, :5]
    wanted = torch.autograd.grad(
        grouped_mm_reference(inner, weights, ends[1]).square().sum(), weights
    )
    torch.testing.assert_close(once, wanted[0])
    torch.testing.assert_close(again, wanted[0])


@pytest.mark.parametrize("frozen", [True, False])
def test_split_experts_pass_gradients_on_when_they_are_frozen(frozen):
    x, weights, ends = case(3, 5, 7, [3, 0, 4], torch.float64)
    weights.requires_grad_(not frozen)
    SplitExperts(weights).product(x, [3, 0, 4]).sum().backward()
    wanted = torch.autograd.grad(grouped_mm_reference(x, weights, ends).sum(), x)
    torch.testing.assert_close(x.grad, wanted[0])
    assert (weights.grad is None) == frozen


def test_moe_experts_takes_split_weights():
    gate_up, down = torch.randn(4, 6, 5), torch.randn(4, 5, 3)
    x, expert = torch.randn(3, 5), torch.tensor([[0, 3], [3, 0], [2, 3]])
    weight, counts = torch.rand(3, 2), torch.bincount(expert.flatten(), minlength=4)
    torch.testing.assert_close(
        moe_experts(x, expert, weight, SplitExperts(gate_up), SplitExperts(down), counts),
        moe_experts(x, expert, weight, gate_up, down, counts),
    )
