import pytest
import torch

from openmythos.model.norm import RMSNorm
from tests.strategies import unchecked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_fp32_and_the_cast_comes_before_the_weight(dtype):
    norm = RMSNorm(8, 1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
    x = (torch.randn(4, 8) * 300).to(dtype)  # the squares overflow fp16
    wide = x.float() / (x.float().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    got = norm(x)
    assert got.dtype == dtype
    assert torch.equal(got, wide.to(dtype) * norm.weight)


def test_a_zero_vector_stays_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    RMSNorm(4, 1e-6)(x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_wide_weight_does_not_widen_the_stream():
    assert RMSNorm(4, 1e-6)(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


def test_a_norm_of_another_width_is_refused():
    with unchecked(), pytest.raises(RuntimeError, match="must match the size"):
        RMSNorm(32, 1e-6)(torch.randn(2, 256))
