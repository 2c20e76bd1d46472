import gc
import weakref

import pytest
import torch
from torch.nn import functional

from openmythos.ops.moe import (
    LoopedExperts,
    gathered_experts,
    grouped_mm,
    grouped_mm_reference,
    has_native,
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
def test_grouped_mm_under_the_compiler(fresh_compiler, num_in, num_out, dtype):
    with unchecked():
        compiled = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")
        x, weights, ends = case(3, num_in, num_out, [3, 0, 4], dtype)
        got, wanted = compiled(x, weights, ends), grouped_mm_reference(x, weights, ends)
        torch.testing.assert_close(got, wanted)
        ours = torch.autograd.grad(got.square().sum(), (x, weights))
        theirs = torch.autograd.grad(wanted.square().sum(), (x, weights))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


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
    got = moe_experts(x, expert, weight, counts, gate_up, down)
    wanted = experts_reference(x, expert, weight, gate_up, down)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    gathered = gathered_experts(x, expert, weight, gate_up, down)
    torch.testing.assert_close(gathered, wanted, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(got.square().sum(), leaves)
    theirs = torch.autograd.grad(wanted.square().sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    assert not ours[2][2].any()


# --- all loops of one forward on a CPU -----------------------------------------------------------

WAYS = {  # width of the model, of an expert, dtype: by torch's products, by our kernel
    "torch": (8, 5, torch.float64),
    "torch in fp32": (8, 5, torch.float32),
    "kernel": (64, 32, torch.float32),
    "kernel past a block": (320, 288, torch.float32),
}


def test_the_kernel_takes_the_ways_named_after_it(compiler):
    for name, way in WAYS.items():
        weights = experts_case(*way)
        taken = {has_native(each, loop_case(5, *way[::2], 1)[0]) for each in weights}
        assert taken == {name.startswith("kernel")}


def test_experts_refuse_shapes_that_do_not_fit():
    experts = LoopedExperts(*experts_case(64, 32, torch.float32))
    x, expert, weight, counts = loop_case(5, 64, torch.float32, 1)
    with unchecked():
        for wrong in (
            (x[:, :32], expert, weight, counts),
            (x[:4], expert, weight, counts),
            (x, expert, weight[:, :1], counts),
            (x, expert, weight, counts + 1),
        ):
            with pytest.raises(ValueError, match="do not fit width 64"):
                experts(*wrong)


def test_experts_of_no_tokens_and_second_derivatives():
    for way in WAYS.values():
        weights, case = experts_case(*way), loop_case(5, *way[::2], 1)
        x, expert, weight, counts = case
        assert LoopedExperts(*weights)(x[:0], expert[:0], weight[:0], counts * 0).shape == (
            0,
            way[0],
        )
        y = LoopedExperts(*weights)(*case)
        with pytest.raises(RuntimeError, match="second derivatives of experts"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


BY_WAY = pytest.mark.parametrize(("dim", "width", "dtype"), WAYS.values(), ids=WAYS)


def experts_case(dim: int, width: int, dtype: torch.dtype, num_experts: int = 6):
    generator = seeded(7)
    gate_up = torch.randn(num_experts, 2 * width, dim, generator=generator).to(dtype) / dim**0.5
    down = torch.randn(num_experts, dim, width, generator=generator).to(dtype) / width**0.5
    return gate_up.requires_grad_(), down.requires_grad_()


def loop_case(num_tokens: int, dim: int, dtype: torch.dtype, seed: int, num_experts: int = 6):
    """x, experts, weights, counts; one expert is never chosen, one by every token."""
    generator = seeded(seed)
    x = torch.randn(num_tokens, dim, generator=generator).to(dtype).requires_grad_()
    expert = torch.randint(1, num_experts - 1, (num_tokens, 1), generator=generator)
    expert = torch.cat((torch.zeros_like(expert), expert), dim=1)
    weight = torch.rand(num_tokens, 2, generator=generator).to(dtype).requires_grad_()
    return x, expert, weight, torch.bincount(expert.flatten(), minlength=num_experts)


def assert_equal(got, wanted, dtype):
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@BY_WAY
@pytest.mark.parametrize("num_tokens", [1, 7, 150])
def test_looped_experts_equal_the_reference_forward_and_backward(dim, width, dtype, num_tokens):
    """Two uses, as by two loops: the gradient of the weights is that of both."""
    weights = experts_case(dim, width, dtype)
    cases = [loop_case(num_tokens, dim, dtype, 1), loop_case(3, dim, dtype, 2)]
    experts = LoopedExperts(*weights)
    got = torch.cat([experts(*case) for case in cases])
    wanted = torch.cat([experts_reference(*case[:3], *weights) for case in cases])
    assert_equal([got], [wanted], dtype)
    leaves = [*weights, *(case[i] for case in cases for i in (0, 2))]
    pull = torch.randn(got.shape[::-1], generator=seeded(4)).to(dtype).mT
    ours = torch.autograd.grad(got, leaves, pull)
    assert_equal(ours, torch.autograd.grad(wanted, leaves, pull), dtype)
    assert not ours[0][5].any()
    assert not ours[1][5].any()


@BY_WAY
def test_looped_experts_count_each_backward_pass_alone(dim, width, dtype):
    """A pass that stops before the weights, then one that reaches them, then it again."""
    weights = experts_case(dim, width, dtype)
    x, *routing = loop_case(9, dim, dtype, 1)
    experts = LoopedExperts(*weights)
    first = experts(x, *routing)
    loss = experts(first, *loop_case(9, dim, dtype, 2)[1:]).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    torch.autograd.grad(first.sum(), weights, retain_graph=True)
    once, again = (torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2))
    inner = experts_reference(x, *routing[:2], *weights)
    other = loop_case(9, dim, dtype, 2)
    wanted = experts_reference(inner, *other[1:3], *weights).square().sum()
    wanted = torch.autograd.grad(wanted, weights)
    assert_equal(once, wanted, dtype)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


@BY_WAY
@pytest.mark.parametrize("frozen", [(True, True), (False, True), (True, False)], ids=str)
def test_looped_experts_pass_gradients_on_when_they_are_frozen(dim, width, dtype, frozen):
    weights = experts_case(dim, width, dtype)
    for each, still in zip(weights, frozen, strict=True):
        each.requires_grad_(not still)
    case = loop_case(5, dim, dtype, 1)
    LoopedExperts(*weights)(*case).sum().backward()
    leaves = [case[0], case[2], *(each for each in weights if each.requires_grad)]
    wanted = torch.autograd.grad(experts_reference(*case[:3], *weights).sum(), leaves)
    assert_equal([leaf.grad for leaf in leaves], wanted, dtype)
    assert [each.grad is None for each in weights] == list(frozen)


@BY_WAY
def test_looped_experts_without_gradients(dim, width, dtype):
    weights, case = experts_case(dim, width, dtype), loop_case(5, dim, dtype, 1)
    with torch.no_grad():
        got = LoopedExperts(*weights)(*case)
        assert_equal([got], [moe_experts(*case, *weights)], dtype)
    assert not got.requires_grad


def test_looped_experts_notice_weights_that_change_before_the_backward_pass():
    weights, case = experts_case(64, 32, torch.float32), loop_case(5, 64, torch.float32, 1)
    y = LoopedExperts(*weights)(*case)
    with torch.no_grad():
        weights[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_looped_experts_are_freed_without_a_collection():
    """No cycle holds the graph, and with it the activations of a forward."""
    weights, case = experts_case(64, 32, torch.float32), loop_case(5, 64, torch.float32, 1)
    experts = LoopedExperts(*weights)
    y, kept = experts(*case), weakref.ref(experts._weights)
    gc.disable()
    try:
        del experts, y
        assert kept() is None
    finally:
        gc.enable()


def test_the_kernel_gives_the_same_bits_with_any_threads(compiler):
    weights, case = experts_case(64, 32, torch.float32), loop_case(40, 64, torch.float32, 1)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = LoopedExperts(*weights)(*case)
            found.append((y, *torch.autograd.grad(y.square().sum(), [*weights, case[0]])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
