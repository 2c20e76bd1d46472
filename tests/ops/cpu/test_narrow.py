import pytest
import torch
from torch.nn import functional

from openmythos.ops.cpu import narrow
from openmythos.ops.moe import gathered_experts
from tests.strategies import seeded


@pytest.fixture
def kernels(compiler: None) -> None:
    assert narrow.load()


@pytest.mark.parametrize("rows", [*range(1, narrow.MAX_ROWS + 1), 13])
@pytest.mark.parametrize("inner", [7, 32, 100])
def test_linear_equals_torch(kernels: None, rows: int, inner: int) -> None:
    generator = seeded(rows)
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(21, inner, generator=generator)
    torch.testing.assert_close(narrow.linear(x, weight), functional.linear(x, weight))


def test_linear_takes_leading_dimensions_and_strides(kernels: None) -> None:
    x, weight = torch.randn(3, 6, 2, generator=seeded(1)).mT, torch.randn(4, 12)[:, ::2]
    torch.testing.assert_close(narrow.linear(x, weight), functional.linear(x, weight))


@pytest.mark.parametrize("slots", [1, 3])
def test_experts_equal_the_reference(kernels: None, slots: int) -> None:
    generator = seeded(2)
    x = torch.randn(5, 19, generator=generator)
    gate_up = torch.randn(6, 2 * 11, 19, generator=generator)
    down = torch.randn(6, 19, 11, generator=generator)
    expert = torch.stack([torch.randperm(6, generator=generator)[:slots] for _ in range(5)])
    weight = torch.rand(5, slots, generator=generator)
    got = narrow.experts(x, expert, weight, gate_up, down)
    wanted = gathered_experts(x, expert, weight, gate_up, down)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
