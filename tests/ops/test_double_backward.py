import pytest
import torch
from torch.nn import functional

from openmythos.ops.attention import attention, attention_reference
from openmythos.ops.norm import rms_norm
from tests.strategies import seeded


@pytest.mark.parametrize("name", ["norm", "attention"])
def test_second_derivatives_are_those_of_torch(compiler, name):
    """A penalty on the gradient, with another term beside it."""
    wanted_of = {
        "norm": (lambda x: rms_norm(x, 1e-5), lambda x: functional.rms_norm(x, (64,), None, 1e-5)),
        "attention": tuple(
            lambda x, way=way: way(x[..., :32], x[..., 32:], x[..., 16:48], None, 0.3)
            for way in (attention, attention_reference)
        ),
    }
    found = []
    for function in wanted_of[name]:
        x = torch.randn(1, 2, 40, 64, generator=seeded()).requires_grad_()
        loss = function(x).sum() + x.square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        found += torch.autograd.grad(gradient.square().sum(), x)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
