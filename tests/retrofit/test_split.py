from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from openmythos.config import (
    CopyInitConfig,
    DepthAttentionConfig,
    LinearInjectionConfig,
    NormalInitConfig,
    ZerosInitConfig,
)
from openmythos.interop.families.huginn import RETROFITTED
from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.retrofit.split import Layers, check_stack, retrofit
from tests.interop.families.examples import check_generation, exported
from tests.interop.families.test_llama import TOKENS, llama_logits, random_llama
from tests.strategies import random_model, seeded, small_config

WHOLE = Layers(prelude=(0, 1), core=(2, 3, 4), coda=(5,))
DROPPING = Layers(prelude=(0,), core=(3, 4), coda=(5,))


def loaded(folder: Path, **changes: Any) -> tuple[transformers.LlamaForCausalLM, RecurrentDepthLM]:
    """A Llama of six layers, theirs and ours."""
    theirs = random_llama(num_hidden_layers=6, **changes)
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder)


def without_layers(model: transformers.LlamaForCausalLM, kept: tuple[int, ...]) -> None:
    layers = [model.model.layers[i] for i in kept]
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(kept)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", [ZerosInitConfig(), CopyInitConfig(), NormalInitConfig(std=0.5)])
@torch.no_grad()
def test_one_loop_of_all_layers_is_the_original(tmp_path: Path, init: Any, tied: bool) -> None:
    """And so is any number of loops, until training moves W_h; whatever h_0 is."""
    theirs, ours = loaded(tmp_path, tie_word_embeddings=tied)
    made = retrofit(ours, WHOLE, state_init=init)
    wanted = llama_logits(theirs, TOKENS)
    for num_loops in (1, 2, 4):
        found = made(TOKENS, num_loops=num_loops).logits
        assert (found - wanted).abs().max() < 1e-5
    assert wanted.std() > 0.5
    assert made.config.num_loops == 4
    assert not made.training


@torch.no_grad()
def test_with_carry_one_loop_is_the_original_and_more_are_not(tmp_path: Path) -> None:
    """So that an adapter, which does not train W_h, has a loop to change."""
    theirs, ours = loaded(tmp_path)
    made = retrofit(ours, WHOLE, state_init=CopyInitConfig(), carry=0.5)
    wanted = llama_logits(theirs, TOKENS)
    one, two = (made(TOKENS, num_loops=n).logits for n in (1, 2))
    assert (one - wanted).abs().max() < 1e-5 < (two - wanted).abs().max()
    for init, carry in ((None, 0.5), (CopyInitConfig(), 1.5), (CopyInitConfig(), -0.1)):
        with pytest.raises(ValueError, match="carry"):
            retrofit(ours, WHOLE, state_init=init, carry=carry)


@torch.no_grad()
def test_one_loop_after_dropping_is_the_kept_layers(tmp_path: Path) -> None:
    theirs, ours = loaded(tmp_path)
    made = retrofit(ours, DROPPING, num_loops=3)
    full = llama_logits(theirs, TOKENS)
    without_layers(theirs, DROPPING.kept)
    pruned = llama_logits(theirs, TOKENS)
    assert (made(TOKENS, num_loops=1).logits - pruned).abs().max() < 1e-5
    assert (pruned - full).abs().max() > 0.1
    assert DROPPING.dropped(6) == (1, 2)
    assert made.config.num_loops == 3
    assert [len(made.prelude), len(made.core), len(made.coda)] == [1, 2, 1]


@torch.no_grad()
def unrolled(
    model: transformers.LlamaForCausalLM, layers: Layers, w_h: Tensor, w_e: Tensor, num_loops: int
) -> Tensor:
    """The looped forward out of transformers' layers, written down loop by loop; h_0 = 0."""
    inner = model.model

    def run(x: Tensor, chosen: tuple[int, ...]) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        angles = inner.rotary_emb(x, positions)
        for i in chosen:
            x = inner.layers[i](x, attention_mask=mask, position_embeddings=angles)
        return x

    e = run(inner.embed_tokens(TOKENS), layers.prelude)
    h = torch.zeros_like(e)
    for _ in range(num_loops):
        h = run(h @ w_h.T + e @ w_e.T, layers.core)
    return model.lm_head(inner.norm(run(h, layers.coda)))


@pytest.mark.parametrize("num_loops", [1, 2, 5])
@torch.no_grad()
def test_depth_r_is_the_explicit_unrolled_copy(tmp_path: Path, num_loops: int) -> None:
    """With an adapter as training may leave it."""
    theirs, ours = loaded(tmp_path)
    made = retrofit(ours, DROPPING)
    for weight in (made.injection.h_weight, made.injection.e_weight):
        weight += torch.randn(weight.shape, generator=seeded()) / 20
    w_h, w_e = made.injection.h_weight, made.injection.e_weight
    wanted = unrolled(theirs, DROPPING, w_h, w_e, num_loops)
    assert (made(TOKENS, num_loops=num_loops).logits - wanted).abs().max() < 1e-4
    one = made(TOKENS, num_loops=1).logits
    assert num_loops == 1 or (one - wanted).abs().max() > 0.01


def test_the_loop_can_be_learnt(tmp_path: Path) -> None:
    """W_h starts at zero and gets a gradient from the second loop on."""
    made = retrofit(loaded(tmp_path)[1], WHOLE).train()
    for num_loops, learns in ((1, False), (2, True)):
        made.zero_grad()
        made(TOKENS, num_loops=num_loops).logits.square().mean().backward()
        assert bool(made.injection.h_weight.grad.any()) is learns
        assert made.injection.e_weight.grad.any()


@torch.no_grad()
def test_untied_it_is_a_retrofitted_huginn(tmp_path: Path) -> None:
    """As the recipe has it: a head of its own, and noise for h_0 that W_h = 0 hides."""
    _, ours = loaded(tmp_path / "source", tie_word_embeddings=True)
    made = retrofit(ours, DROPPING, state_init=NormalInitConfig(std=0.0087), untie=True)
    assert made.head is not None and made.head.weight is not made.embed.weight
    assert torch.equal(made.head.weight, ours.embed.weight)
    again = load_pretrained(exported(RETROFITTED, made, tmp_path / "huginn"))
    assert again.config == made.config
    assert torch.equal(again(TOKENS).logits, made(TOKENS).logits)
    kept = retrofit(ours, DROPPING)
    assert kept.head is None
    assert torch.equal(kept(TOKENS).logits, made(TOKENS).logits)


def test_nothing_is_shared_with_the_source(tmp_path: Path) -> None:
    _, ours = loaded(tmp_path)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    made = retrofit(ours, WHOLE)
    with torch.no_grad():
        for weight in made.parameters():
            weight.fill_(7.0)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in before.items())


def test_generation_with_a_cache_is_that_without(tmp_path: Path) -> None:
    config = retrofit(loaded(tmp_path)[1], DROPPING).config
    assert config.injection == LinearInjectionConfig()
    for num_loops in (1, 8):
        check_generation(config, num_loops)


def test_layers_in_any_place_are_refused(tmp_path: Path) -> None:
    for wrong in ({"core": (2, 2)}, {"prelude": (3,), "core": (1,)}, {"core": (-1, 0)}):
        with pytest.raises(ValueError, match="rising layers, each once"):
            Layers(**wrong)
    with pytest.raises(ValueError, match=r"core is .*at least one layer"):
        Layers(core=())
    _, ours = loaded(tmp_path)
    with pytest.raises(ValueError, match="last layer is 6; it must be at most 5"):
        retrofit(ours, Layers(core=(5, 6)))


def test_only_a_plain_stack_can_be_retrofitted(tmp_path: Path) -> None:
    made = retrofit(loaded(tmp_path)[1], WHOLE)
    for model in (made, random_model(small_config())):
        with pytest.raises(ValueError, match=r"no plain stack.*num_prelude_layers is"):
            retrofit(model, Layers(core=(0,)))
    stack = load_pretrained(tmp_path).config
    check_stack(stack, WHOLE)
    with pytest.raises(ValueError, match="num_loops is 2"):
        check_stack(replace(stack, num_loops=2), WHOLE)
    deep = replace(stack, depth_attention=DepthAttentionConfig(num_recent_loops=2))
    with pytest.raises(ValueError, match=r'depth_attention is \{"num_recent_loops": 2\}'):
        check_stack(deep, WHOLE)
