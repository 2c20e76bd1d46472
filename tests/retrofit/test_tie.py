import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openmythos.config import WeightLoRAConfig
from openmythos.config.schema import apply_overrides
from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.retrofit.split import Layers, retrofit
from openmythos.retrofit.tie import STARTS, low_rank, tie
from tests.interop.families.examples import check_generation
from tests.interop.families.test_llama import SHAPES, TOKENS, llama_logits, random_llama
from tests.strategies import random_model, seeded

ALL = Layers(core=(0, 1, 2, 3, 4, 5))
MATRICES = ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")
FULL = 32  # d_model of the tests' Llama


def loaded(folder: Path, **changes: Any) -> RecurrentDepthLM:
    random_llama(num_hidden_layers=6, **changes).save_pretrained(folder)
    return load_pretrained(folder)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("num_core_layers", [1, 2, 3])
@torch.no_grad()
def test_full_rank_is_the_untied_model(tmp_path: Path, num_core_layers: int, start: str) -> None:
    source = loaded(tmp_path)
    tied = tie(source, ALL, num_core_layers=num_core_layers, rank=FULL, start=start)
    assert tied.model.config.num_loops == 6 // num_core_layers
    assert len(tied.model.core) == num_core_layers
    assert tied.error < 1e-6
    wanted = source(TOKENS).logits
    assert wanted.std() > 0.5
    assert (tied.model(TOKENS).logits - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_full_rank_of_other_shapes_and_parts(tmp_path: Path) -> None:
    """Matrices of several widths, a prelude and a coda; compared with transformers."""
    change = SHAPES["as many kv heads, wider than the stream"] | {"tie_word_embeddings": True}
    theirs = random_llama(num_hidden_layers=6, **change)
    theirs.save_pretrained(tmp_path)
    layers = Layers(prelude=(0,), core=(1, 2, 3, 4), coda=(5,))
    made = tie(load_pretrained(tmp_path), layers, num_core_layers=2, rank=24).model
    assert (made(TOKENS, num_loops=2).logits - llama_logits(theirs, TOKENS)).abs().max() < 1e-5


@torch.no_grad()
def test_error_falls_with_the_rank_as_the_singular_values_say(tmp_path: Path) -> None:
    """Eckart and Young: what is left is the root of the summed squares of the values cut off."""
    source = loaded(tmp_path)
    ranks = (0, 1, 2, 4, 8, 16, 24, 31, 32)
    found = [tie(source, ALL, num_core_layers=2, rank=rank).error for rank in ranks]
    assert all(a > b for a, b in itertools.pairwise(found))
    folded = folded_layers(source)
    values, whole = [], 0.0
    for k in range(2):
        for name in MATRICES:
            stack = torch.stack([layer[name] for layer in folded[k::2]])
            values.append(torch.linalg.svdvals(stack - stack.mean(dim=0)))
            whole += float(stack.square().sum())
    for rank, error in zip(ranks[:-1], found, strict=False):
        left = sum(float(s[:, rank:].square().sum()) for s in values)
        assert error == pytest.approx(math.sqrt(left / whole), rel=1e-6)


def folded_layers(source: RecurrentDepthLM) -> list[dict[str, Tensor]]:
    """Each layer's matrices times the norms before them, in fp64."""
    layers = []
    for block in source.core:
        ones = torch.ones(())
        before = (block.attention_norm.weight, ones, block.feed_forward_norm.weight, ones)
        layers.append(
            {
                name: block.get_submodule(name).weight.detach().double() * gain.detach().double()
                for name, gain in zip(MATRICES, before, strict=True)
            }
        )
    return layers


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("average", [(0, 3), (1, 4), (2, 5)]),
        ("lower", [(0,), (1,), (2,)]),
        ("stepwise", [(0,), (2,), (5,)]),  # 0, 2.5 (to even) and 5
    ],
)
@torch.no_grad()
def test_where_the_shared_weights_come_from(
    tmp_path: Path, start: str, expected: list[tuple[int, ...]]
) -> None:
    source = loaded(tmp_path)
    made = tie(source, ALL, num_core_layers=3, rank=0, start=start).model
    assert made.config.loop_adapter is None
    folded = folded_layers(source)
    for block, layers in zip(made.core, expected, strict=True):
        assert torch.equal(block.attention_norm.weight, torch.ones(32))
        assert torch.equal(block.feed_forward_norm.weight, torch.ones(32))
        for name in MATRICES:
            wanted = torch.stack([folded[i][name] for i in layers]).mean(dim=0)
            assert torch.allclose(block.get_submodule(name).weight, wanted.float(), atol=1e-6)


@torch.no_grad()
def test_equal_layers_need_no_change(tmp_path: Path) -> None:
    """A stack that repeats two layers is a loop of two already: the changes are zero."""
    source = loaded(tmp_path)
    for layer in range(2, 6):
        source.core[layer].load_state_dict(source.core[layer % 2].state_dict())
    tied = tie(source, ALL, num_core_layers=2, rank=1)
    assert tied.error < 1e-6
    for block in tied.model.core:
        for name in MATRICES:
            assert block.get_submodule(name).lora_up.abs().max() < 1e-5
    assert (tied.model(TOKENS).logits - source(TOKENS).logits).abs().max() < 1e-5


def test_low_rank_is_the_nearest_product() -> None:
    residual = torch.randn(3, 5, 7, generator=seeded(), dtype=torch.float64)
    down, up = low_rank(residual, 2)
    assert down.shape == (3, 2, 7) and up.shape == (3, 5, 2)
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    best = u[:, :, :2] @ torch.diag_embed(s[:, :2]) @ vh[:, :2]
    assert torch.allclose(up @ down, best, atol=1e-12)
    assert torch.allclose(down @ down.mT, torch.eye(2, dtype=torch.float64), atol=1e-12)
    down, up = low_rank(residual, 7)  # above full: 5
    assert torch.allclose(up @ down, residual, atol=1e-12)
    assert not down[:, 5:].any() and not up[:, :, 5:].any()


def test_generation_with_a_cache_is_that_without(tmp_path: Path) -> None:
    made = tie(loaded(tmp_path), ALL, num_core_layers=2, rank=3).model
    assert made.config.loop_adapter == WeightLoRAConfig(rank=3, num_loops=3)
    for num_loops in (1, 3):
        check_generation(made.config, num_loops)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_core_layers": 4}, "tie is 4; it must be a divisor of the core's 6 layers"),
        ({"num_core_layers": 0}, "tie is 0"),
        ({"rank": 33}, r"rank is 33; it must be in 0\.\.32"),
        ({"start": "upper"}, "start is 'upper'; it must be one of 'stepwise', 'average', 'lower'"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tie(loaded(tmp_path), ALL, **({"num_core_layers": 2, "rank": 1} | options))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("attention.qk_norm=weighted", "qk_norm is 'weighted'"),
        ("attention.qk_bias=true", "qk_bias is True"),
        ("block.norm=peri", r"block\.norm is 'peri'"),
        ("block.layer_scale=0.1", r"block\.layer_scale is 0\.1"),
        ('feed_forward={"kind": "relu_squared", "d_ff": 8}', "kind is 'relu_squared'"),
    ],
)
def test_stacks_with_more_that_differs_by_layer(tmp_path: Path, change: str, said: str) -> None:
    config = apply_overrides(loaded(tmp_path).config, [change])
    with pytest.raises(ValueError, match=said):
        tie(random_model(config), ALL, num_core_layers=2, rank=1)


def test_a_retrofitted_model_is_not_tied_again(tmp_path: Path) -> None:
    made = retrofit(loaded(tmp_path), Layers(core=(0, 1)))
    with pytest.raises(ValueError, match="no plain stack"):
        tie(made, Layers(core=(0, 1)), num_core_layers=1, rank=1)
