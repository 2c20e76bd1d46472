import pytest
import torch

from openmythos.analysis.observe import observe, wide
from openmythos.model.cache import KVCache
from openmythos.model.feedforward import MoE
from openmythos.model.inference import inference
from tests.analysis.family import KINDS, model_of
from tests.strategies import random_tokens

NUM_LOOPS = 3


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_a_plain_forward_bit_for_bit(kind: str) -> None:
    model = model_of(kind)
    tokens = random_tokens(model.config, 2, 6)
    with inference(model):
        plain = model(tokens, num_loops=NUM_LOOPS, keep_states=True).states
        loops = list(observe(model, tokens, NUM_LOOPS, model.context(tokens)))
        again = model(tokens, num_loops=NUM_LOOPS, keep_states=True).states
    assert [loop.number for loop in loops] == [1, 2, 3]
    for loop, state, later in zip(loops, plain, again, strict=True):
        assert torch.equal(loop.state.h, state)
        assert torch.equal(state, later)
        assert len(loop.places) == 1 + model.config.num_core_layers
        assert all(place.shape == state.shape for place in loop.places)
    assert loops[0].earlier is None and loops[2].earlier is not None
    assert loops[2].earlier.earlier is None
    assert torch.equal(loops[2].before, plain[1])
    assert torch.equal(loops[2].earlier.update, loops[1].update)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_what_the_blocks_take_and_return(kind: str) -> None:
    model = model_of(kind)
    tokens = random_tokens(model.config, 1, 5)
    ctx = model.context(tokens)
    with inference(model):
        loop = next(observe(model, tokens, 1, ctx))
        here, index = ctx.at_loop(0, ctx.recent), torch.zeros(1, dtype=torch.int64)
        e = model.encode(tokens, ctx)
        x = model.injection(e, model.signal(loop.before, index, ctx))
        assert torch.equal(loop.places[0], x)
        for block, place in zip(model.core, loop.places[1:], strict=True):
            x = block(x, here, index)
            assert torch.equal(place, x)


@pytest.mark.parametrize("kind", ["moe", "ifm-moe"])
def test_experts_are_those_that_the_forward_used(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chosen = model_of(kind), []
    tokens = random_tokens(model.config, 2, 5)
    ctx = model.context(tokens)
    with inference(model):
        loops = list(observe(model, tokens, 2, ctx))
        plain = MoE.route

        def recorded(self: MoE, *given: object) -> object:
            result = plain(self, *given)
            chosen.append(result[0])
            return result

        monkeypatch.setattr(MoE, "route", recorded)
        model(tokens, num_loops=2, ctx=ctx)
    of_core = [block.feed_forward for block in model.core]
    layers = [index for index, part in enumerate(of_core) if isinstance(part, MoE)]
    before = sum(isinstance(block.feed_forward, MoE) for block in model.prelude)
    found = [loop.experts[layer].flatten(0, 1) for loop in loops for layer in layers]
    assert layers and [*loops[0].experts] == layers
    for ours, theirs in zip(found, chosen[before:], strict=False):
        assert torch.equal(ours, theirs)


def test_measures_are_taken_in_at_least_fp32() -> None:
    assert wide(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_bad_input_is_named() -> None:
    model = model_of("plain")
    tokens = random_tokens(model.config, 1, 4)
    with pytest.raises(ValueError, match="num_loops is 0"):
        next(observe(model, tokens, 0, model.context(tokens)))
    cache = KVCache(model.config, batch_size=1, max_len=8, max_loops=2)
    with pytest.raises(ValueError, match="ctx has a cache"):
        next(observe(model, tokens, 2, model.context(tokens, cache=cache)))
