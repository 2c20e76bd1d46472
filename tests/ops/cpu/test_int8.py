import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from openmythos.ops import int8 as reference
from openmythos.ops.cpu import build, int8
from openmythos.ops.cpu.choice import Timing
from tests.strategies import seeded, unchecked


@pytest.fixture
def kernels(compiler: None) -> Iterator[None]:
    int8._decided.cache_clear()
    assert int8.load()
    yield
    int8._decided.cache_clear()


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def cases(rows: int, inner: int) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every product with so many rows of x and such a width."""
    matrix, by_head = reference.quantise(some(21, inner)), reference.quantise(some(3, 20, inner))
    gate_up = reference.quantise(some(6, 2 * 11, inner, seed=2) / inner**0.5)
    down = reference.quantise(some(6, inner, 11, seed=3))
    expert = torch.arange(2 * rows).view(rows, 2) % 6
    return [
        ("linear", (some(rows, inner), *matrix)),
        ("heads", (some(3, rows, inner), *by_head, 4, 9)),
        ("absorb", (some(3, rows, 9), *by_head, 4)),
        ("experts", (some(rows, inner), expert, torch.rand(rows, 2), *gate_up, *down)),
    ]


def expected(name: str, case: tuple[Any, ...]) -> Tensor:
    """In fp64, where the order of a sum makes no difference that counts."""
    product = getattr(reference, "gathered_experts" if name == "experts" else name)
    wide = [
        each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in case
    ]
    return product(*wide)


@pytest.mark.parametrize("rows", [*range(1, 10), int8.MAX_ROWS, int8.MAX_ROWS + 1])
@pytest.mark.parametrize("inner", [7, 64, 100])
def test_products_are_exact_up_to_the_sum(kernels: None, rows: int, inner: int) -> None:
    for name, case in cases(rows, inner):
        found = getattr(int8, name)(*case)
        torch.testing.assert_close(
            found.double(), expected(name, case), rtol=1e-5, atol=1e-5, msg=name
        )


def test_a_row_is_the_same_among_others(kernels: None) -> None:
    matrix = reference.quantise(some(21, 100))
    x = some(int8.MAX_ROWS, 100)
    together = int8.linear(x, *matrix)
    alone = [int8.linear(row, *matrix) for row in x.split(1)]
    assert torch.equal(torch.cat(alone), together)


def test_the_kernels_are_used(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for product, kernel in int8.KERNELS.items():

        def noted(*case: Any, kernel: Any = kernel) -> Tensor:
            called.append(kernel)
            return kernel(*case)

        monkeypatch.setitem(int8.KERNELS, product, noted)
    for name, case in cases(2, 64):
        getattr(int8, name)(*case)
    assert called == [int8._linear, int8._heads, int8._absorb, int8._experts]


def test_other_dtypes_and_switched_off_kernels_take_the_references(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = some(2, 64).double(), *reference.quantise(some(21, 64))
    assert not int8.beats_torch(reference.linear, *wide)
    assert int8.linear(*wide).dtype == torch.float64
    monkeypatch.setenv(build.OFF, "narrow")
    for name, case in cases(2, 64):
        found = getattr(int8, name)(*case)
        torch.testing.assert_close(found.double(), expected(name, case), rtol=1e-5, atol=1e-5)
    assert not int8.beats_torch(reference.linear, some(2, 64), *wide[1:])


def test_results_do_not_depend_on_the_threads(kernels: None) -> None:
    x, matrix = some(3, 512), reference.quantise(some(301, 512, seed=2))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(int8.linear(x, *matrix))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, v, s: (x, v.int(), s), "values must be int8"),
        (lambda x, v, s: (x, v, s[:-1]), "scale has the shape"),
        (lambda x, v, s: (x[:, 1:].contiguous(), v, s), "x has the shape"),
        (lambda x, v, s: (x, v[:, ::2], s), "values must have a last stride of 1"),
    ],
)
def test_wrong_calls_are_refused(kernels: None, wrong: Any, message: str) -> None:
    right = some(2, 8), *reference.quantise(some(4, 8))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.openmythos_narrow.linear_int8(*wrong(*right))


def test_races_run_both_products(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "POOL_BYTES", 1 << 12)
    asked: dict[str, Timing] = {}

    def remember(name: str, measure: functools.partial[Timing]) -> bool:
        asked[name] = measure()
        return False

    monkeypatch.setattr(int8, "ours_wins", remember)
    with unchecked():
        for name, case in cases(2, 64):
            found = getattr(int8, name)(*case)
            torch.testing.assert_close(found.double(), expected(name, case), rtol=1e-5, atol=1e-5)
    assert asked.pop("int8 linear of 2x64, 21x64, 21").ours > 0
    assert "int8 heads of 3x2x64, 3x20x64, 3x20, 4, 9" in asked
    assert all(timing.ours > 0 and timing.torch > 0 for timing in asked.values())
