import functools

import pytest
import torch
from torch.nn import functional

from openmythos.ops.cpu import narrow
from openmythos.ops.cpu.choice import Timing
from openmythos.ops.moe import gathered_experts
from tests.strategies import seeded, unchecked


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
@pytest.mark.parametrize(("dim", "width"), [(19, 11), (64, 32), (50, 70)])
def test_experts_equal_the_reference(kernels: None, slots: int, dim: int, width: int) -> None:
    generator = seeded(2)
    x = torch.randn(5, dim, generator=generator)
    gate_up = torch.randn(6, 2 * width, dim, generator=generator) / dim**0.5
    down = torch.randn(6, dim, width, generator=generator)
    expert = torch.stack([torch.randperm(6, generator=generator)[:slots] for _ in range(5)])
    weight = torch.rand(5, slots, generator=generator)
    got = narrow.experts(x, expert, weight, gate_up, down)
    wanted = gathered_experts(x, expert, weight, gate_up, down)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_results_do_not_depend_on_the_threads(kernels: None) -> None:
    x, weight = torch.randn(3, 512, generator=seeded(1)), torch.randn(301, 512, generator=seeded(2))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(narrow.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-5)


def test_no_rows_and_no_columns(kernels: None) -> None:
    assert narrow.linear(torch.ones(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert torch.equal(narrow.linear(torch.ones(2, 0), torch.ones(3, 0)), torch.zeros(2, 3))


def test_races_run_both_products(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "POOL_BYTES", 1 << 16)
    asked: dict[str, Timing] = {}

    def remember(name: str, measure: functools.partial[Timing]) -> bool:
        asked[name] = measure()
        return True

    monkeypatch.setattr(narrow, "ours_wins", remember)
    with unchecked():
        assert narrow.beats_linear(2, 8, 16)
        assert narrow.beats_experts(2, 3, 8, 16)
    assert list(asked) == ["linear 8 x 16, rows 2", "experts 3 of 8 x 16, rows 2"]
    assert all(timing.ours > 0 and timing.torch > 0 for timing in asked.values())
