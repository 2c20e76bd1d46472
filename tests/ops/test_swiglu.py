import pytest
import torch
from torch.nn import functional

from openmythos.ops.swiglu import swiglu, swiglu_backward
from tests.strategies import seeded


def test_swiglu_by_its_formula():
    inner = torch.randn(5, 6, generator=seeded())
    torch.testing.assert_close(swiglu(inner), functional.silu(inner[:, :3]) * inner[:, 3:])


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("width", [16, 10])
def test_the_written_out_gradient_equals_that_of_torch(rows, width):
    inner = (torch.randn(2 * rows, 2 * width, generator=seeded()) * 4).requires_grad_()
    share = torch.rand(rows, 2, generator=seeded(1)).requires_grad_()
    order = torch.randperm(2 * rows, generator=seeded(2))
    pull = torch.randn(2 * rows, width, generator=seeded(3))
    wanted = swiglu(inner) * share.flatten()[order, None]
    theirs = torch.autograd.grad(wanted, [inner, share], pull)
    with torch.no_grad():
        ours = swiglu_backward(pull, inner, share, order)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
