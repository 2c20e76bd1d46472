import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from openmythos.ops.cpu import build as native
from openmythos.ops.swiglu import _takes, swiglu, swiglu_backward, swiglu_forward, swiglu_reference
from tests.strategies import seeded

ROWS = [1, 5, 40]


@pytest.fixture
def kernels(compiler: None) -> None:
    assert native.load("fused")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [16, 48, 10])
def test_swiglu_and_its_gradient_equal_torch(kernels, rows, shared, width):
    inner = (normal(2 * rows, 2 * width) * 4).requires_grad_()
    share = torch.rand(rows, 2, generator=seeded(1)).requires_grad_() if shared else None
    order = torch.randperm(2 * rows, generator=seeded(2)) if shared else None
    gate, up = inner.chunk(2, dim=-1)
    wanted = functional.silu(gate) * up
    wanted = wanted * share.flatten()[order, None] if shared else wanted
    pull = normal(2 * rows, width, seed=3)
    theirs = torch.autograd.grad(wanted, [inner, share] if shared else [inner], pull)
    with torch.no_grad():
        got = swiglu_forward(inner, share, order)
        ours = swiglu_backward(pull, inner, share, order)
    assert _takes(inner) == (width != 10)
    torch.testing.assert_close(got, wanted)
    for mine, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
    assert (ours[1] is None) == (not shared)


def test_the_exponential_is_exact_to_two_units_and_never_overflows(kernels):
    gate = torch.linspace(-86, 86, 16 * 5001).view(-1, 16)
    one = torch.ones_like(gate)
    got = swiglu_forward(torch.cat((gate, one), dim=-1))
    wanted = functional.silu(gate.double())
    assert ((got - wanted) / wanted.abs().clamp(min=1e-30)).abs().max() < 3e-7
    far = torch.tensor([-1e30, -1e4, -89, -87.5, 87.5, 89, 1e4, 1e30]).repeat(1, 2)
    got = swiglu_forward(torch.cat((far, torch.ones_like(far)), dim=-1))
    torch.testing.assert_close(got, functional.silu(far), rtol=1e-6, atol=1e-30)
    gone = swiglu_forward(torch.full((1, 32), float("nan")))
    assert gone.isnan().all()


def test_other_tensors_and_transforms_of_functions_are_left_to_torch():
    x = normal(3, 64)
    assert not _takes(x.double())
    assert not _takes(x[:0])
    assert swiglu_forward(x[:0]).shape == (0, 32)
    with FakeTensorMode():
        assert swiglu(torch.zeros(2, 64)).shape == (2, 32)
    per_row = torch.vmap(torch.func.grad(lambda row: swiglu(row).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(swiglu_reference(leaf).square().sum(), leaf)
    torch.testing.assert_close(per_row, wanted, rtol=1e-4, atol=1e-5)


def test_shares_that_are_not_packed(kernels):
    inner, order = normal(14, 64), torch.arange(14)
    for share in (torch.rand(2, 7).T, torch.rand(7, 1).expand(7, 2)):
        got = (
            swiglu_forward(inner, share, order),
            swiglu_backward(inner[:, :32], inner, share, order),
        )
        packed = share.contiguous()
        wanted = (
            swiglu_forward(inner, packed, order),
            swiglu_backward(inner[:, :32], inner, packed, order),
        )
        assert torch.equal(got[0], wanted[0])
        assert all(torch.equal(*pair) for pair in zip(got[1], wanted[1], strict=True))


def test_results_may_be_changed_in_place(kernels):
    swiglu(normal(2, 3, 64).requires_grad_()).mul_(2).sum().backward()
