import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from openmythos.config import (
    ACTConfig,
    BlockConfig,
    DepthAttentionConfig,
    GateInjectionConfig,
    LearnedLoopConfig,
    LinearInjectionConfig,
    ModelConfig,
    OriginalLTIInjectionConfig,
    OutputLoRAConfig,
    PonderNetConfig,
    ReLUSquaredConfig,
    UniversalACTConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
)
from openmythos.model.cache import KVCache
from openmythos.model.context import ForwardContext
from openmythos.model.loop import LoopState, advance, readout, start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import GQA, MLA, MOE, random_model, random_tokens, small_config

DEPTH = small_config(depth_attention=DepthAttentionConfig(num_recent_loops=2))


def begun(model, tokens, depths, wait=False) -> tuple[LoopState, ForwardContext]:
    ctx = model.context(tokens)
    return start_loops(model, model.encode(tokens, ctx), ctx, depths, wait=wait), ctx


@torch.no_grad()
@pytest.mark.parametrize("halting", [None, ACTConfig(bias_init=-1.0), UniversalACTConfig()])
def test_one_loop_after_another_is_forward(halting):
    model = random_model(small_config(halting=halting), dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 5)
    out = model(tokens, num_loops=4, keep_states=True)
    state, ctx = begun(model, tokens, [4, 4])
    for loop in range(4):
        assert state.loops == (loop, loop) == tuple(state.loop_idx.tolist())
        state = advance(model, state, ctx)
        assert torch.equal(state.h, out.states[loop])
    assert torch.equal(model.decode(readout(model, state), ctx), out.logits)


@torch.no_grad()
@pytest.mark.parametrize("halting", [ACTConfig(bias_init=0.0), PonderNetConfig()])
def test_a_row_may_end_after_any_loop(halting):
    """The readout is that of a forward of so many loops, whether the row goes on or not."""
    model = random_model(small_config(halting=halting), dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 5)
    state, ctx = begun(model, tokens, [5, 5])
    for loop in range(1, 6):
        state = advance(model, state, ctx)
        out = model(tokens, num_loops=loop)
        torch.testing.assert_close(model.decode(readout(model, state), ctx), out.logits)
        weight, tracker = state.halted.ended(model.halting)
        torch.testing.assert_close(weight, out.exit_weights[-1])
        torch.testing.assert_close(tracker.ponder, out.ponder_cost)


@torch.no_grad()
def test_a_waiting_row_gives_out_no_mass_and_costs_nothing():
    model = random_model(small_config(halting=ACTConfig(bias_init=-1.0)), dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 5)
    state, ctx = begun(model, tokens, [1, 4], wait=True)
    assert state.loops == (-3, 0)
    start = state
    for _ in range(3):
        state = advance(model, state, ctx)
    assert state.loops == (0, 3)
    assert torch.equal(state.h[0], start.h[0])
    assert not state.halted.tracker.mass[0].any() and not state.halted.tracker.ponder[0].any()
    state = advance(model, state, ctx)
    alone = model(tokens[:1], num_loops=1)
    torch.testing.assert_close(state.h[:1], alone.h)
    torch.testing.assert_close(state.halted.ended(model.halting)[1].ponder[:1], alone.ponder_cost)


@torch.no_grad()
@pytest.mark.parametrize("config", [small_config(halting=ACTConfig()), DEPTH], ids=["act", "depth"])
def test_selected_rows_go_on_as_if_alone(config):
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 3, 5)
    state, ctx = begun(model, tokens, [5, 5, 5])
    state = advance(model, advance(model, state, ctx), ctx)
    part, live = state.select([2, 0]), ctx.select([2, 0])
    for _ in range(3):
        part = advance(model, part, live)
    wanted = model(tokens[[2, 0]], num_loops=5)
    torch.testing.assert_close(part.h, wanted.h)
    torch.testing.assert_close(model.decode(readout(model, part), live), wanted.logits)


@torch.no_grad()
def test_states_are_replaced_and_never_changed():
    model = random_model(DEPTH, dtype=torch.float64)
    start, ctx = begun(model, random_tokens(DEPTH, 2, 4), [3, 3])
    kept = start.h.clone(), [part.clone() for part in start.recent[0]]
    states = list(unroll(model, start, ctx))
    assert torch.equal(start.h, kept[0])
    assert all(torch.equal(a, b) for a, b in zip(start.recent[0], kept[1], strict=True))
    assert [state.loops for state in states] == [(1, 1), (2, 2), (3, 3)]
    newest, before = states[1].recent[0][0], states[0].recent[0][0]
    assert torch.equal(newest[1], before[0])  # the newest loop stands first


def test_the_last_loops_carry_gradients():
    model = random_model(DEPTH, dtype=torch.float64)
    start, ctx = begun(model, random_tokens(DEPTH, 1, 4), [2])
    first = advance(model, start, ctx)
    keys, _ = first.recent[0]
    keys.retain_grad()
    advance(model, first, ctx).h.square().sum().backward()
    assert keys.grad[0].abs().max() > 0
    assert not keys.grad[1].any()  # there was no loop before the first


def owners() -> list[ModelConfig]:
    """Configurations that together have every kind of parameter, and every way to use one."""
    table = ValueEmbeddingConfig(layers=(0, 2), gate_channels=4)
    heads = replace(GQA, qk_norm="weighted", qk_bias=True)
    experts = replace(MOE, bias_loops=2)
    return [
        small_config(injection=OriginalLTIInjectionConfig(), tie_embeddings=True),
        small_config(injection=LinearInjectionConfig(), attention=MLA, readout="linear"),
        small_config(
            injection=GateInjectionConfig(),
            attention=heads,
            value_embedding=table,
            block=BlockConfig(norm="peri", layer_scale=0.1),
            loop_embedding=LearnedLoopConfig(num_loops=2),
        ),
        small_config(
            core_feed_forward=experts,
            loop_adapter=WeightLoRAConfig(rank=2, num_loops=2),
            halting=ACTConfig(),
            tie_embeddings=False,
        ),
        small_config(
            loop_adapter=OutputLoRAConfig(rank=2, num_loops=2),
            depth_attention=DepthAttentionConfig(num_recent_loops=2),
            loop_norm=True,
            feed_forward=ReLUSquaredConfig(d_ff=8),
        ),
    ]


def used(model: RecurrentDepthLM, tokens: Tensor) -> list[Tensor]:
    """Logits of a forward, of packed documents, and of a cache in a chunk and token by token."""
    cache = KVCache(model.config, batch_size=2, max_len=5, max_loops=3, dtype=torch.float64)
    found = [model(tokens, num_loops=torch.tensor([3, 1])).logits]
    for part in tokens.split((3, 1, 1), dim=1):
        found.append(model(part, num_loops=3, ctx=model.context(part, cache=cache)).logits)
    return found


def hide(model: RecurrentDepthLM) -> None:
    """Fill every parameter with NaN except while its owner's forward runs."""
    for module in model.modules():
        owned = list(module.parameters(recurse=False))
        kept = [parameter.detach().clone() for parameter in owned]

        def show(*_: object, owned=owned, kept=kept) -> None:
            for parameter, value in zip(owned, kept, strict=True):
                parameter.copy_(value)

        def lose(*_: object, owned=owned) -> None:
            for parameter in owned:
                parameter.fill_(math.nan)

        if owned:
            module.register_forward_pre_hook(show)
            module.register_forward_hook(lose)
            lose()


@torch.no_grad()
def test_no_parameter_is_read_outside_the_forward_of_its_owner():
    """Sharding, offload and hooks rely on it: elsewhere every parameter is filled with NaN."""
    for config in owners():
        model = random_model(config, dtype=torch.float64)
        tokens = random_tokens(config, 2, 5)
        wanted = used(model, tokens)
        assert all(logits.isfinite().all() for logits in wanted)
        hide(model)
        assert all(p.isnan().all() for p in model.parameters())
        for got, logits in zip(used(model, tokens), wanted, strict=True):
            assert torch.equal(got, logits)
