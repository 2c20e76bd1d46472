"""Our C++ kernels against torch's operators, which their fallbacks are made of."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from openmythos.ops import native
from tests.strategies import seeded

ROWS = [1, 5, 40]


@pytest.fixture
def kernels(compiler: None) -> None:
    assert native.load("fused")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


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
        got, scale = native.rms_norm(x, weight, 1e-5)
        ours = native.rms_norm_backward(pull, x, weight, scale)
    assert native.has_fused(x) == (width != 20)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(scale, (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    for mine, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert (ours[1] is None) == (not weighted)


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
        got = native.swiglu(inner, share, order)
        ours = native.swiglu_backward(pull, inner, share, order)
    assert native.has_fused(inner) == (width != 10)
    torch.testing.assert_close(got, wanted)
    for mine, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
    assert (ours[1] is None) == (not shared)


def test_the_exponential_is_exact_to_two_units_and_never_overflows(kernels):
    gate = torch.linspace(-86, 86, 16 * 5001).view(-1, 16)
    one = torch.ones_like(gate)
    got = native.swiglu(torch.cat((gate, one), dim=-1))
    wanted = functional.silu(gate.double())
    assert ((got - wanted) / wanted.abs().clamp(min=1e-30)).abs().max() < 3e-7
    far = torch.tensor([-1e30, -1e4, -89, -87.5, 87.5, 89, 1e4, 1e30]).repeat(1, 2)
    got = native.swiglu(torch.cat((far, torch.ones_like(far)), dim=-1))
    torch.testing.assert_close(got, functional.silu(far), rtol=1e-6, atol=1e-30)
    gone = native.swiglu(torch.full((1, 32), float("nan")))
    assert gone.isnan().all()


def test_sums_over_rows_do_not_depend_on_the_threads(kernels, two_threads):
    x, weight, pull = normal(700, 512), normal(512, seed=1), normal(700, 512, seed=2)
    _, scale = native.rms_norm(x, weight, 1e-5)
    both = native.rms_norm_backward(pull, x, weight, scale)
    torch.set_num_threads(1)
    alone = native.rms_norm_backward(pull, x, weight, scale)
    assert all(torch.equal(*pair) for pair in zip(both, alone, strict=True))


def test_other_dtypes_and_no_rows_are_left_to_torch():
    assert not native.has_fused(torch.zeros(2, 32, dtype=torch.float64))
    assert not native.has_fused(torch.zeros(2, 32), torch.zeros(32, dtype=torch.bfloat16))
    assert not native.has_fused(torch.zeros(0, 32))
    assert native.swiglu(torch.zeros(0, 32)).shape == (0, 16)


def test_a_compiler_that_fails_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match=r"narrow.cpp could not be built with false"):
        assert not native.load.__wrapped__("narrow")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not native.load.__wrapped__("narrow")  # without a compiler nobody expects it
