"""Our C++ kernels against torch's operators, which their fallbacks are made of."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from openmythos.model.feedforward import swiglu
from openmythos.model.norm import RMSNorm, rms_norm
from openmythos.ops.attention import attention, attention_reference
from openmythos.ops.cpu import build as native
from tests.strategies import seeded, unchecked

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
    assert (native._whole(x) and native.takes("fused", x)) == (width != 20)
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
    assert native.takes_swiglu(inner) == (width != 10)
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


def test_what_is_not_plain_fp32_with_rows_is_left_to_torch():
    x = torch.zeros(2, 32)
    assert not native.takes_swiglu(x.double())
    assert not native.takes("fused", x, torch.zeros(32, dtype=torch.bfloat16))
    assert not native.takes_swiglu(x[:0])
    assert native.swiglu(x[:0]).shape == (0, 16)
    with FakeTensorMode():
        assert swiglu(torch.zeros(2, 64)).shape == (2, 32)
        assert rms_norm(torch.zeros(2, 64), 1e-5).shape == (2, 64)
        assert attention(*[torch.zeros(1, 2, 64, 32)] * 3, None, 1.0).shape == (1, 2, 64, 32)


def test_transforms_of_functions_are_left_to_torch():
    x = normal(3, 64)
    for function in (swiglu, lambda x: rms_norm(x, 1e-5)):
        per_row = torch.vmap(torch.func.grad(lambda row, f=function: f(row).square().sum()))(x)
        leaf = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
        torch.testing.assert_close(per_row, wanted, rtol=1e-4, atol=1e-5)


def test_operands_that_are_not_packed(kernels):
    x = normal(3, 64)
    weight, scattered = torch.full((1,), 2.0).expand(64), normal(128)[::2]
    for each in (weight, scattered):
        torch.testing.assert_close(rms_norm(x, 1e-5, each), rms_norm(x, 1e-5, each.contiguous()))
    inner, order = normal(14, 64), torch.arange(14)
    for share in (torch.rand(2, 7).T, torch.rand(7, 1).expand(7, 2)):
        got = (
            native.swiglu(inner, share, order),
            native.swiglu_backward(inner[:, :32], inner, share, order),
        )
        packed = share.contiguous()
        wanted = (
            native.swiglu(inner, packed, order),
            native.swiglu_backward(inner[:, :32], inner, packed, order),
        )
        assert torch.equal(got[0], wanted[0])
        assert all(torch.equal(*pair) for pair in zip(got[1], wanted[1], strict=True))


def test_a_norm_of_another_width_is_refused(kernels):
    with unchecked(), pytest.raises(RuntimeError, match="must match the size"):
        RMSNorm(32, 1e-6)(torch.randn(2, 256))


def test_results_may_be_changed_in_place(kernels):
    x = normal(2, 3, 64).requires_grad_()
    q = normal(1, 2, 40, 32).requires_grad_()
    for y in (rms_norm(x, 1e-6), swiglu(x), attention(q, q, q, None, 1.0)):
        y.mul_(2).sum().backward()


@pytest.mark.parametrize("name", ["norm", "swiglu", "attention"])
def test_second_derivatives_are_those_of_torch(kernels, name):
    """A penalty on the gradient, with another term beside it."""
    wanted_of = {
        "norm": (lambda x: rms_norm(x, 1e-5), lambda x: functional.rms_norm(x, (64,), None, 1e-5)),
        "swiglu": (swiglu, lambda x: functional.silu(x[..., :32]) * x[..., 32:]),
        "attention": tuple(
            lambda x, way=way: way(x[..., :32], x[..., 32:], x[..., 16:48], None, 0.3)
            for way in (attention, attention_reference)
        ),
    }
    found = []
    for function in wanted_of[name]:
        x = normal(1, 2, 40, 64).requires_grad_()
        loss = function(x).sum() + x.square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        found += torch.autograd.grad(gradient.square().sum(), x)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


# --- building ------------------------------------------------------------------------------------


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "echo 'narrow.cpp:1: error: no such thing' >&2; echo '  ^~~~' >&2; exit 1",
            "no such thing",
        ),
        ("echo ' ' >&2; exit 3", "exit status 3"),
    ],
)
def test_a_compiler_that_fails_costs_one_warning(monkeypatch, tmp_path, text, reason):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "libraries"))
    monkeypatch.setenv("CXX", script(tmp_path, text))
    with pytest.warns(UserWarning, match=rf"narrow.cpp could not be built with .*{reason}"):
        assert not native._load.__wrapped__("narrow")
    assert list((tmp_path / "libraries" / "openmythos").iterdir()) == []


def test_without_a_compiler_nobody_expects_it(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.find_compiler() is None
    assert not native._load.__wrapped__("narrow")
    monkeypatch.setenv("CXX", "gone -O2")
    assert native.find_compiler() is None
    with pytest.raises(ValueError, match=r"it must be False without a C\+\+ compiler"):
        native.require_compiler("compiled", True)


def test_threads_that_load_the_same_kernel_build_it_once(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "libraries"))
    calls = tmp_path / "calls"
    build = f"echo called >> {calls}; sleep 0.2; for last; do :; done; echo built > $last"
    monkeypatch.setenv("CXX", script(tmp_path, build))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(native.load, ["narrow"] * 4))
    assert calls.read_text(encoding="utf-8") == "called\n"
