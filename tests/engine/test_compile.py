import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openmythos.engine import compile as compiling
from openmythos.engine.compile import compile_call
from openmythos.engine.reference import generate
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import narrow
from tests.strategies import small_config, unchecked

pytestmark = pytest.mark.usefixtures("compiler")


class Layer(nn.Module):
    """A matrix and a setting that compiled code takes as a constant."""

    def __init__(self, factor: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight) * self.factor


def replaced(layer: Layer, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many products were given to the kernels; the result must be that of torch."""
    calls, kernel = [], narrow.linear

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(x.shape)
        return kernel(x, weight)

    monkeypatch.setattr(narrow, "linear", linear)
    with unchecked(), torch.no_grad():
        torch.testing.assert_close(compile_call(Layer.forward)(layer, x), layer(x))
    return len(calls)


@pytest.mark.slow
def test_products_of_few_rows_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replaced(Layer(2.0), torch.randn(2, 1, 4), monkeypatch) > 0


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float64, 1), (torch.float32, narrow.MAX_ROWS + 1)], ids=str
)
def test_other_products_are_left_to_torch(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replaced(Layer(2.0, dtype), torch.randn(rows, 4, dtype=dtype), monkeypatch) == 0


def test_models_do_not_share_graphs() -> None:
    """Their settings are not guarded."""
    x = torch.ones(1, 4)
    with unchecked(), torch.no_grad():
        for factor in (2.0, 3.0):
            assert compile_call(Layer.forward)(Layer(factor), x)[0, 0] == 4 * factor


def test_what_cannot_change_is_not_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's settings and the package's names: checking them took longer than a product."""
    layer, x, graphs = Layer(2.0), torch.ones(1, 4), list[int]()

    def call(layer: Layer, x: Tensor) -> Tensor:
        return functional.linear(x, layer.weight) * layer.factor

    monkeypatch.setattr(compiling, "_backend", lambda graph, inputs: graphs.append(1) or graph)
    compiled = compile_call(call)
    with unchecked(), torch.no_grad():
        first = compiled(layer, x)
        layer.factor = 3.0
        monkeypatch.setattr(functional, "linear", None)
        assert torch.equal(compiled(layer, x), first)
    assert len(graphs) == 1


@pytest.mark.slow
def test_sessions_give_the_eager_logits_share_graphs_and_forget_a_model() -> None:
    layers = {"num_prelude_layers": 0, "num_core_layers": 1, "num_coda_layers": 0}
    model = RecurrentDepthLM(small_config(**layers)).eval()
    settings: dict[str, Any] = {"max_new_tokens": 2, "num_loops": 2, "return_logits": True}
    eager = generate(model, [[1, 2]], **settings)
    with unchecked(), mock.patch.object(compiling, "compile_call", wraps=compile_call) as compiler:
        for _ in range(2):
            found = generate(model, [[1, 2]], compiled=True, **settings)
            assert found.tokens == eager.tokens
            torch.testing.assert_close(found.logits, eager.logits, rtol=1e-4, atol=1e-5)
    assert compiler.call_count == 3
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
