import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from openmythos.ops.norm import rms_norm
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


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [32, 20])
def test_the_written_out_gradient_equals_torch(rows, weighted, width):
    x = torch.randn(2, rows, width, generator=seeded(0)).requires_grad_()
    weight = torch.randn(width, generator=seeded(1)).requires_grad_() if weighted else None
    inputs = [x, weight] if weighted else [x]
    pull = torch.randn(2, width, rows, generator=seeded(2)).mT  # not side by side
    ours, theirs = rms_norm(x, 1e-5, weight), functional.rms_norm(x, (width,), weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(y, inputs, pull) for y in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_fake_tensors_and_transforms_of_functions():
    with FakeTensorMode():
        assert rms_norm(torch.zeros(2, 64), 1e-5).shape == (2, 64)
    x = torch.randn(3, 64, generator=seeded())
    per_row = torch.vmap(torch.func.grad(lambda row: rms_norm(row, 1e-5).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(rms_norm(leaf, 1e-5).square().sum(), leaf)
    torch.testing.assert_close(per_row, wanted, rtol=1e-4, atol=1e-5)


def test_results_may_be_changed_in_place():
    x = torch.randn(2, 3, 64, requires_grad=True)
    rms_norm(x, 1e-6).mul_(2).sum().backward()
