import pytest
import torch

from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import random_model, small_config


def modes(model: RecurrentDepthLM) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def partly_frozen() -> RecurrentDepthLM:
    model = random_model(small_config()).train()
    model.coda.eval()  # by its owner, who wants it back as it was
    return model


def test_inside_nothing_trains_and_outside_all_is_as_before() -> None:
    model = partly_frozen()
    before = modes(model)
    with torch.enable_grad():
        with inference(model):
            assert not any(modes(model).values())
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
    assert modes(model) == before
    assert before["core"] and not before["coda"]


def test_an_error_inside_restores_too() -> None:
    model = partly_frozen()
    before = modes(model)
    with pytest.raises(ZeroDivisionError), inference(model):
        _ = 1 / 0
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_nested_and_on_a_model_in_evaluation_mode() -> None:
    model = random_model(small_config())
    with inference(model), inference(model):
        assert not model.training
    assert not any(modes(model).values())


def test_any_module_will_do() -> None:
    foreign = torch.nn.Sequential(torch.nn.Dropout(0.5))
    with inference(foreign):
        assert foreign(torch.ones(8)).tolist() == [1.0] * 8
    assert foreign.training
