"""The checks of annotations can fail: of types, of shapes, of results, between arguments."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from tests.checked import Loader, outline
from tests.strategies import unchecked

SOURCE = """
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Absent


def product(
    a: Float[Tensor, "N K"], b: Float[Tensor, "K M"], *, cut: int = 0
) -> Float[Tensor, "N M"]:
    return (a @ b)[cut:]


def either(x: Float[Tensor, "N"] | None) -> "Absent":
    return x


def rows(x: Float[Tensor, "N K"]) -> Iterator[Float[Tensor, "K"]]:
    yield from x


@dataclass(frozen=True)
class Pair:
    left: int
    right: str = ""

    @property
    def text(self) -> str:
        return self.left if self.left < 0 else str(self.left)

    @classmethod
    def of(cls, left: int) -> "Pair":
        return cls(left)

    @staticmethod
    def twice(x: Float[Tensor, "N"], y: Float[Tensor, "N"]) -> int:
        return 2
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = tmp_path / "made_up.py"
    path.write_text(SOURCE, encoding="utf-8")
    made = ModuleType("made_up")
    monkeypatch.setitem(sys.modules, "made_up", made)
    exec(Loader("made_up", str(path)).get_code("made_up"), vars(made))
    assert not list(tmp_path.glob("__pycache__/*"))
    return made


def test_what_fits_passes(module: ModuleType) -> None:
    assert module.product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert module.either(None) is None  # its result's type is known to type checkers only
    assert len(list(module.rows(torch.ones(2, 3)))) == 2
    assert module.Pair.of(3).text == "3"
    assert module.Pair.twice(torch.ones(2), torch.ones(2)) == 2


def test_what_does_not_fit_is_refused(module: ModuleType) -> None:
    wrong = [
        lambda: module.product(torch.ones(2, 3), torch.ones(4, 3)),  # K of a is not K of b
        lambda: module.product(torch.ones(2, 3), torch.ones(3)),
        lambda: module.product(torch.ones(2, 3), torch.ones(3, 4).int()),
        lambda: module.product(torch.ones(2, 3), torch.ones(3, 4), cut=1),  # the result has N - 1
        lambda: module.product(torch.ones(2, 3), torch.ones(3, 4), cut="1"),
        lambda: module.either(3),
        lambda: next(module.rows(torch.ones(2))),
        lambda: module.Pair("3"),
        lambda: module.Pair(-1).text,
        lambda: module.Pair.of(None),
        lambda: module.Pair.twice(torch.ones(2), torch.ones(3)),
    ]
    for call in wrong:
        with pytest.raises(BeartypeCallHintViolation):
            call()


def test_what_has_fitted_says_nothing_about_another_shape(module: ModuleType) -> None:
    for _ in range(2):
        assert module.product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
        assert module.either(torch.ones(2)) is not None
        with pytest.raises(BeartypeCallHintViolation):  # equal arguments but for a value
            module.product(torch.ones(2, 3), torch.ones(3, 4), cut=1)
        with pytest.raises(BeartypeCallHintViolation):
            module.product(torch.ones(2, 3).int(), torch.ones(3, 4).int())
        with pytest.raises(BeartypeCallHintViolation):
            module.either(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), torch.ones(2).int()),
        (torch.ones(2), torch.nn.Parameter(torch.ones(2))),
        (np.ones(2), torch.ones(2)),
        ([torch.ones(2)], [torch.ones(2), torch.ones(3)]),
        ((1, 2.0), (2.0, 1)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": None}),
        ("a", "b"),
        (int, float),
        (1, True),
    ],
)
def test_outlines_differ_where_an_annotation_may(one: object, other: object) -> None:
    assert outline(one) != outline(other)
    assert outline(one) == outline(one)


def test_the_checks_can_be_switched_off(module: ModuleType) -> None:
    with unchecked():
        assert module.Pair("3").left == "3"
        assert module.product(torch.ones(2, 3), torch.ones(3, 4), cut=1).shape == (1, 4)
    with pytest.raises(BeartypeCallHintViolation):
        module.Pair("3")
