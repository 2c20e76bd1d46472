from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

from openmythos.config import ModelConfig
from openmythos.model.adapter import AdaptedWeight, LowRank, adapt, changes_of
from openmythos.model.recurrent import RecurrentDepthLM
from tests.interop.hf.examples import DENSE, LATENT, SPARSE
from tests.strategies import random_model, random_tokens, seeded, unchecked

KINDS = {"dense": DENSE, "latent": LATENT, "sparse": SPARSE}


def change(num_out: int, num_in: int, start: int = 0, seed: int = 0) -> LowRank:
    """One of rank 3 that is far from nothing."""
    generator = seeded(seed)
    down = torch.randn(3, num_in, generator=generator) / num_in**0.5
    return LowRank(down, torch.randn(num_out, 3, generator=generator), start, 0.3)


def adapted_model(config: ModelConfig, dtype: torch.dtype) -> RecurrentDepthLM:
    """A random model, in whose core every second row of every linear layer is changed."""
    model = random_model(config)
    changes: dict[str, Sequence[LowRank]] = {}
    for name, module in model.core.named_modules(prefix="core"):
        if isinstance(module, nn.Linear) and not name.endswith("router"):
            half, num_in = len(module.weight) // 2, module.in_features
            parts = [change(half, num_in), change(2, num_in, half, seed=1)]
            changes[f"{name}.weight"] = parts
    adapt(model, changes)
    return model.to(dtype)


def merge(model: RecurrentDepthLM) -> None:
    """The merged matrices in the places of the adapted ones."""
    for name in changes_of(model):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        whole = getattr(module, leaf).merged()
        delattr(module, leaf)
        setattr(module, leaf, nn.Parameter(whole))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_is_unmerged(kind: str, dtype: torch.dtype, most: float) -> None:
    config = KINDS[kind]
    model, tokens = adapted_model(config, dtype), random_tokens(config, 2, 9)
    with torch.no_grad():
        unmerged = model(tokens).logits
        merge(model)
        merged = model(tokens).logits
        plain = random_model(config).to(dtype)(tokens).logits
    assert not changes_of(model)
    assert (merged - unmerged).abs().max() < most * merged.abs().max()
    assert (merged - plain).abs().max() > 0.1
    assert model.state_dict().keys() == random_model(config).state_dict().keys()


def test_only_the_changes_get_gradients_and_those_of_the_sum() -> None:
    config = DENSE
    model, tokens = adapted_model(config, torch.float64), random_tokens(config, 2, 9)
    model(tokens).logits.square().mean().backward()
    name = "core.0.attention.qkv.weight"
    part = changes_of(model)[name][0]
    assert isinstance(part, LowRank)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if ".changes." in n
    }
    found = [part.down.grad, part.up.grad]
    merge(model)
    model(tokens).logits.square().mean().backward()
    whole = model.get_parameter(name).grad[part.start : part.stop] * part.scale
    wanted = [part.up.detach().mT @ whole, whole @ part.down.detach().mT]
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)


def test_other_uses_are_refused_or_get_the_merged_matrix() -> None:
    weight = AdaptedWeight(torch.zeros(6, 4), [change(2, 4, start=1)])
    part = change(2, 4, start=1)
    assert torch.equal(weight.view(3, 2, 4).flatten(0, 1), weight.merged())
    assert torch.allclose(weight.merged()[1:3], 0.3 * part.up @ part.down)
    assert not weight.merged()[3:].any()
    with pytest.raises(TypeError, match="does not take adapted weights"):
        functional.embedding(torch.zeros(2, dtype=torch.int64), weight)


def test_a_compiled_step_with_an_adapter_is_the_eager_one() -> None:
    """In one graph, as dynamo sees it; without generated code, which would take long."""
    model, tokens = adapted_model(DENSE, torch.float32), random_tokens(DENSE, 2, 9)
    with torch.no_grad(), unchecked():
        eager = model(tokens).logits
        model.step = torch.compile(model.step, backend="eager", fullgraph=True)
        assert torch.equal(model(tokens).logits, eager)
