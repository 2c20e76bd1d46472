import pytest
import torch

from openmythos.analysis.budget import LiveBytes, OverBudget, rows_within
from openmythos.analysis.depth import DepthSums, measure_depth
from openmythos.analysis.dynamics import DynamicsSums, measure_dynamics
from openmythos.analysis.example import Examples, text_examples
from openmythos.analysis.lens import LensSums, measure_lenses
from tests.analysis.family import model_of
from tests.strategies import random_tokens

MODEL = model_of("plain")


def examples(rows: int = 12, length: int = 9) -> Examples:
    return text_examples(random_tokens(MODEL.config, rows, length).tolist(), "random tokens")


def test_bytes_count_while_tensors_are_alive() -> None:
    layer = torch.nn.Linear(10, 10)
    with LiveBytes(layer) as meter, torch.no_grad():
        a = torch.zeros(100)
        assert meter.now == 400
        b = a[:50]  # the same memory
        assert meter.now == 400
        c = layer(torch.zeros(3, 10))
        assert meter.now == 400 + c.numel() * 4
        del a, b
        assert meter.now == c.numel() * 4
    assert meter.peak == 400 + 240


def test_more_bytes_than_allowed_stop_at_once() -> None:
    with pytest.raises(OverBudget, match="allowed"), LiveBytes(MODEL, 1000):
        torch.zeros(1000)


@pytest.mark.parametrize("name", ["depth", "dynamics", "lenses"])
def test_instruments_stay_within_their_bytes(name: str) -> None:
    found = examples()
    one = {
        "depth": lambda part: DepthSums(4).add(MODEL, part),
        "dynamics": lambda part: DynamicsSums(MODEL).add(MODEL, part, 4),
        "lenses": lambda part: LensSums().add(MODEL, part, 4),
    }[name]
    measure = {"depth": measure_depth, "dynamics": measure_dynamics, "lenses": measure_lenses}[name]
    with LiveBytes(MODEL) as meter:
        one(found.rows(0, 1))
    allowed = 5 * meter.peak
    assert rows_within(allowed, lambda: one(found.rows(0, 1)), MODEL) == 4
    with LiveBytes(MODEL) as whole:
        measure(MODEL, found, 4, allowed)
    assert meter.peak < whole.peak <= allowed
    with pytest.raises(OverBudget, match=r"one row needs more; give more bytes"):
        measure(MODEL, found, 4, meter.peak // 2)
