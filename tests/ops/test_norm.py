from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from openmythos.ops.cpu import build as native
from openmythos.ops.norm import rms_norm, rms_norm_backward, rms_norm_forward
from tests.strategies import seeded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_mean_square(dtype):
    x = torch.randn(3, 5, 8, dtype=dtype) * 7
    wanted = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x, 1e-5), wanted)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_written_out_gradient(weighted):
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = (x, weight) if weighted else (x,)
    assert torch.autograd.gradcheck(lambda x, w=None: rms_norm(x, 1e-5, w), inputs)


# --- on CPUs: our kernel against the operators of torch -------------------------------------------

ROWS = [1, 5, 40]


@pytest.fixture
def kernels(compiler: None) -> None:
    assert native.load("fused")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [32, 96, 20])  # the last is left to torch
def test_rms_norm_and_its_gradient_equal_torch(kernels, rows, weighted, width):
    x, weight = normal(2, rows, width).requires_grad_(), normal(width, seed=1).requires_grad_()
    weight = weight if weighted else None
    wanted = functional.rms_norm(x, (width,), weight, 1e-5)
    pull = normal(2, width, rows, seed=2).mT  # not side by side
    inputs = [x, weight] if weighted else [x]
    theirs = torch.autograd.grad(wanted, inputs, pull)
    with torch.no_grad():
        got, scale = rms_norm_forward(x, weight, 1e-5)
        ours = rms_norm_backward(pull, x, weight, scale)
    assert (native.whole(x) and native.takes("fused", x)) == (width != 20)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(scale, (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    for mine, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert (ours[1] is None) == (not weighted)


def test_sums_over_rows_do_not_depend_on_the_threads(kernels, two_threads):
    x, weight, pull = normal(700, 512), normal(512, seed=1), normal(700, 512, seed=2)
    _, scale = rms_norm_forward(x, weight, 1e-5)
    both = rms_norm_backward(pull, x, weight, scale)
    torch.set_num_threads(1)
    alone = rms_norm_backward(pull, x, weight, scale)
    assert all(torch.equal(*pair) for pair in zip(both, alone, strict=True))


def test_other_tensors_and_transforms_of_functions_are_left_to_torch():
    x = normal(3, 64)
    assert not native.takes("fused", x, torch.zeros(64, dtype=torch.bfloat16))
    with FakeTensorMode():
        assert rms_norm(torch.zeros(2, 64), 1e-5).shape == (2, 64)
    per_row = torch.vmap(torch.func.grad(lambda row: rms_norm(row, 1e-5).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(rms_norm(leaf, 1e-5).square().sum(), leaf)
    torch.testing.assert_close(per_row, wanted, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_packed(kernels):
    x = normal(3, 64)
    weight, scattered = torch.full((1,), 2.0).expand(64), normal(128)[::2]
    for each in (weight, scattered):
        torch.testing.assert_close(rms_norm(x, 1e-5, each), rms_norm(x, 1e-5, each.contiguous()))


def test_results_may_be_changed_in_place(kernels):
    rms_norm(normal(2, 3, 64).requires_grad_(), 1e-6).mul_(2).sum().backward()
