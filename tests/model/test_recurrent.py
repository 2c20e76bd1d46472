import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from openmythos.config import (
    ACTConfig,
    AddInjectionConfig,
    BlockConfig,
    CopyInitConfig,
    DepthAttentionConfig,
    ExitGateConfig,
    GateInjectionConfig,
    GQAConfig,
    LearnedLoopConfig,
    LinearInjectionConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    NoInjectionConfig,
    NormalInitConfig,
    OriginalLTIInjectionConfig,
    OutputLoRAConfig,
    PonderNetConfig,
    RopeConfig,
    SinusoidalLoopConfig,
    SwiGLUConfig,
    UniversalACTConfig,
    WeightLoRAConfig,
)
from openmythos.config.schema import apply_overrides, from_dict, to_dict
from openmythos.model.cache import KVCache
from openmythos.model.feedforward import MoE
from openmythos.model.loop import advance, start_loops
from openmythos.model.recurrent import ModelOutput, RecurrentDepthLM
from tests.strategies import (
    GQA,
    MLA,
    MOE,
    model_fields,
    random_model,
    random_tokens,
    small_config,
    unchecked,
)

SEED = 11  # of random initial states


def run(model: RecurrentDepthLM, tokens: Tensor, loops: int | Tensor, **options) -> ModelOutput:
    ctx = model.context(tokens, seeds=SEED, **options)
    with torch.no_grad():
        return model(tokens, num_loops=loops, ctx=ctx)


def run_cached(
    model: RecurrentDepthLM,
    tokens: Tensor,
    loops: int | Tensor,
    chunks: list[int],
    mask: Tensor | None = None,
    max_loops: int = 5,
) -> Tensor:
    cache = KVCache(
        model.config,
        batch_size=len(tokens),
        max_len=tokens.shape[1],
        max_loops=max_loops,
        dtype=model.embed.weight.dtype,
    )
    logits, start = [], 0
    for size in chunks:
        part = None if mask is None else mask[:, start : start + size]
        piece = tokens[:, start : start + size]
        logits.append(run(model, piece, loops, cache=cache, padding_mask=part).logits)
        start += size
    return torch.cat(logits, dim=1)


def pad(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + 1
    tokens = torch.full((len(rows), width), 3)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, where], mask[index, where] = row, True
    return tokens, mask


def universal(**changes: Any) -> ModelConfig:
    """A Universal Transformer: whole-stack loop, its signal, its halting; no rotary positions."""
    fields: dict[str, Any] = {
        "num_prelude_layers": 0,
        "num_coda_layers": 0,
        "prelude_norm": False,
        "rope": None,
        "injection": NoInjectionConfig(),
        "loop_embedding": SinusoidalLoopConfig(num_channels=16, positions=True),
        "halting": UniversalACTConfig(bias_init=-1.0),
    }
    return small_config(**{**fields, **changes})


DEPTH = small_config(depth_attention=DepthAttentionConfig(num_recent_loops=2))


# --- one sequence gives the same logits in every company -----------------------------------------


@pytest.mark.slow
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking models takes minutes and shows little
)
@given(
    fields=model_fields(),
    lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    depths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
@example(fields=to_dict(DEPTH), lengths=[5, 2, 3], depths=[4, 1, 5], seed=1)
@example(fields=to_dict(universal()), lengths=[4, 5, 1], depths=[3, 5, 2], seed=2)
def test_batched_padded_packed_cached_and_chunked_equal_alone(fields, lengths, depths, seed):
    config = from_dict(ModelConfig, fields)
    model = random_model(config, seed=seed, dtype=torch.float64)
    tokens = random_tokens(config, 3, 5, seed=seed)
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    ragged, depth = torch.tensor(depths), depths[0]
    alone = [run(model, row[None], loops) for row, loops in zip(rows, depths, strict=True)]
    same = [run(model, row[None], depth).logits[0] for row in rows]

    def check(logits: Tensor, mask: Tensor, expected: list[Tensor]) -> None:
        for row, wanted, visible in zip(logits, expected, mask, strict=True):
            torch.testing.assert_close(row[visible], wanted, rtol=1e-9, atol=1e-9)

    for left in (True, False):
        padded, mask = pad(rows, left=left)
        out = run(model, padded, ragged, padding_mask=mask)
        check(out.logits, mask, [one.logits[0] for one in alone])
        check(out.h, mask, [one.h[0] for one in alone])
        if out.exit_weights is not None:
            check(out.ponder_cost, mask, [one.ponder_cost[0] for one in alone])
            for index, one in enumerate(alone):
                weights = out.exit_weights[:, index, mask[index]]
                waited = len(weights) - depths[index]
                assert not weights[:waited].any()
                torch.testing.assert_close(weights[waited:], one.exit_weights[:, 0])
        check(run(model, padded, depth, padding_mask=mask).logits, mask, same)
        columns = [1] * padded.shape[1]
        cached = run_cached(model, padded, ragged, columns, mask)
        check(cached, mask, [one.logits[0] for one in alone])
        chunked = run_cached(model, padded, depth, [1, padded.shape[1] - 1], mask)
        check(chunked, mask, same)

    ones = torch.ones(len(rows[0]), dtype=torch.bool)[None]
    by_token = run_cached(model, rows[0][None], depth, [1] * len(rows[0]))
    check(by_token, ones, same[:1])
    packed = torch.cat((*rows, torch.zeros(2, dtype=torch.int64)))
    documents = torch.tensor([i for i in range(3) for _ in rows[i]] + [-1, -1])
    logits = run(model, packed[None], depth, documents=documents[None]).logits[0]
    for index, wanted in enumerate(same):
        torch.testing.assert_close(logits[documents == index], wanted, rtol=1e-9, atol=1e-9)


# Widths and lengths that our kernels for CPUs take.
WIDE = {
    "d_model": 64,
    "feed_forward": SwiGLUConfig(d_ff=32),
    "attention": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=32),
}
WIDE_MLA = MLAConfig(
    num_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
WIDE_MOE = MoEConfig(num_experts=4, num_experts_per_token=2, d_expert=32)


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 12),
        ({"attention": MLA}, 12),
        ({"core_feed_forward": MOE}, 12),
        ({"attention": MLA, "core_feed_forward": MOE}, 12),
        (WIDE, 52),
        ({**WIDE, "attention": WIDE_MLA, "core_feed_forward": WIDE_MOE}, 52),
    ],
    ids=["gqa", "mla", "gqa-moe", "mla-moe", "wide-gqa", "wide-mla-moe"],
)
def test_cached_padded_and_packed_equal_alone_in_fp32(changes, length):
    config = small_config(**{**changes, "halting": ACTConfig(bias_init=-1.0)})
    model = random_model(config)
    tokens = random_tokens(config, 2, length)
    whole = run(model, tokens, 8).logits
    scale = whole.abs().max()
    assert scale > 1

    def check(logits: Tensor, expected: Tensor) -> None:
        assert (logits - expected).abs().max() / scale < 1e-4

    for chunks in ([1] * length, [5, length - 5], [length - 4, 1, 1, 2]):
        check(run_cached(model, tokens, 8, chunks, max_loops=8), whole)
    short = length - 8
    padded, mask = pad([tokens[0], tokens[1, :short]], left=True)
    logits = run(model, padded, 8, padding_mask=mask).logits
    check(logits[0, 1:], whole[0])
    check(logits[1, mask[1]], whole[1, :short])
    packed = torch.cat((tokens[0, :9], tokens[1, :short]))
    documents = torch.tensor([0] * 9 + [1] * short)
    logits = run(model, packed[None], 8, documents=documents[None]).logits[0]
    check(logits, torch.cat((whole[0, :9], whole[1, :short])))


def test_gradients_of_packed_documents_are_those_of_each_alone():
    """In fp32 and in widths that our kernels for CPUs take."""
    config = small_config(**{**WIDE, "attention": WIDE_MLA, "core_feed_forward": WIDE_MOE})
    model = random_model(config)
    tokens, documents = random_tokens(config, 1, 60), (torch.arange(60) >= 22).long()[None]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(*losses: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(sum(losses), parameters, materialize_grads=True)
        assert sum(gradient.abs().max() > 0 for gradient in found) > 20
        return list(found)

    ctx = model.context(tokens, documents=documents)
    together = gradients(model(tokens, num_loops=3, ctx=ctx).logits.square().sum())
    parts = [model(tokens[:, part], num_loops=3).logits for part in (slice(22), slice(22, None))]
    alone = gradients(*(logits.square().sum() for logits in parts))
    for mine, other in zip(together, alone, strict=True):
        assert (mine - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))


# --- published recursions, written out -----------------------------------------------------------


@pytest.mark.parametrize("readout", ["basic", "accumulated"])
def test_the_universal_transformer_by_hand(readout):
    """tensor2tensor's loop: signal, probability, transform, interpolation; masks per token."""
    halting = UniversalACTConfig(threshold=0.9, readout=readout, keep_remainder=False)
    model = random_model(universal(halting=halting), seed=3, dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 7)
    ctx = model.context(tokens)
    rates = 10_000.0 ** -(torch.arange(0, 16, 2) / 16).double()

    def wave(places: Tensor) -> Tensor:
        angles = places.double()[..., None] * rates
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    state = model.embed(tokens)
    zeros = torch.zeros(2, 7, dtype=torch.float64)
    hp, rem, n, previous = zeros, zeros, zeros, torch.zeros_like(state)
    for step in range(8):
        state = state + wave(torch.arange(7)) + wave(torch.tensor(step))
        p = (state @ model.halting.proj.weight[0] + model.halting.proj.bias).sigmoid()
        going = hp < 1 - 1e-12
        new_halted = going & (hp + p > 0.9)
        n = n + going
        going = going & ~new_halted
        hp = hp + p * going
        rem = rem + new_halted * (1 - hp)
        hp = hp + new_halted * rem
        w = (p * going + new_halted * rem)[..., None]
        for block in model.core:
            state = block(state, ctx, torch.full((2,), step))
        previous = state * w + previous * (1 - w if readout == "basic" else 1)
    out = run(model, tokens, 8)
    torch.testing.assert_close(out.h, state)
    torch.testing.assert_close(out.ponder_cost, n + rem)
    torch.testing.assert_close(out.logits, model.decode(previous, ctx))
    assert 0 < int((hp > 0.9).sum()) < 14  # some halt, others do not


@pytest.mark.parametrize("block", ["I", "II"])
def test_chens_model_by_hand(block):
    """H~ = f(H + e_t), z = sigmoid([H~; H] W_z + b_z), H' = z H~ + (1 - z) H; e_t from a table."""
    config = small_config(
        num_prelude_layers=0,
        num_core_layers=1,
        num_coda_layers=0,
        prelude_norm=False,
        injection=GateInjectionConfig(add_e=False),
        loop_embedding=LearnedLoopConfig(num_loops=4),
        rope=None if block == "I" else RopeConfig(),
        block=BlockConfig(layer_scale=None if block == "I" else 1e-4),
    )
    fresh = RecurrentDepthLM(config)
    assert fresh.injection.gate.bias.unique().tolist() == [-2]
    if block == "II":
        assert fresh.core[0].attention_scale.unique().tolist() == pytest.approx([1e-4])
        assert fresh.core[0].feed_forward_scale.unique().tolist() == pytest.approx([1e-4])
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 2, 5)
    ctx, layer, gate = model.context(tokens), model.core[0], model.injection.gate
    h = model.embed(tokens)
    for t in range(6):
        x, loop_idx = h + model.loop_embedding.table[min(t, 3)], torch.full((2,), t)
        y = layer.attention(layer.attention_norm(x), ctx, loop_idx)
        x = x + (y if block == "I" else layer.attention_scale * y)
        y = layer.feed_forward(layer.feed_forward_norm(x), loop_idx, ctx)
        x = x + (y if block == "I" else layer.feed_forward_scale * y)
        z = (torch.cat((x, h), dim=-1) @ gate.weight.T + gate.bias).sigmoid()
        h = z * x + (1 - z) * h
    torch.testing.assert_close(run(model, tokens, 6).h, h)


def test_rows_at_different_loops_of_one_step_read_their_own_earlier_loops():
    """Depth attention: a row that starts later has fewer loops to look back on, in one call."""
    model = random_model(DEPTH, dtype=torch.float64)
    tokens = random_tokens(DEPTH, 2, 5)
    wanted = [run(model, row[None], depth).h for row, depth in zip(tokens, (5, 3), strict=True)]
    sizes = []
    model.core[0].register_forward_pre_hook(lambda _, args: sizes.append(args[2].tolist()))
    got = run(model, tokens, torch.tensor([5, 3])).h
    assert sizes == [[0], [1], [2, 0], [3, 1], [4, 2]]
    for row, alone in zip(got, wanted, strict=True):
        torch.testing.assert_close(row, alone[0])


# --- depth ---------------------------------------------------------------------------------------


def test_depth_is_an_argument_and_the_config_only_its_default():
    config = small_config(num_loops=3)
    model = random_model(config)
    tokens = random_tokens(config, 2, 5)
    torch.testing.assert_close(model(tokens).logits, model(tokens, num_loops=3).logits)
    assert (
        model(tokens, num_loops=3).logits - model(tokens, num_loops=7).logits
    ).abs().max() > 0.01


def test_states_are_those_after_every_loop():
    config = small_config()
    model = random_model(config)
    tokens = random_tokens(config, 1, 5)
    out = model(tokens, num_loops=4, keep_states=True)
    assert len(out.states) == 4
    assert model(tokens, num_loops=4).states == ()
    for depth, state in enumerate(out.states, start=1):
        torch.testing.assert_close(state, model(tokens, num_loops=depth).h)


def test_the_calls_of_the_waist_make_up_forward():
    config = small_config(halting=None)
    model = random_model(config)
    tokens = random_tokens(config, 2, 5)
    ctx = model.context(tokens)
    e = model.encode(tokens, ctx)
    h = model.init_state(e, ctx)
    for loop in range(3):
        h = model.step(h, e, torch.full((2,), loop), ctx)
    torch.testing.assert_close(model.decode(h, ctx), model(tokens, num_loops=3).logits)


def test_our_act_lets_loops_matter_at_initialisation():
    """The original's logits were bit-identical for 4 and 64 loops (audit, defect 1)."""
    config = small_config(halting=ACTConfig(), state_init=NormalInitConfig())
    model = RecurrentDepthLM(config).eval()
    tokens = random_tokens(config, 2, 16)
    four, many = (run(model, tokens, loops).logits for loops in (4, 64))
    assert (four - many).abs().max() > 1e-3
    model = random_model(config)  # every weight random, but the halting bias as it starts
    with torch.no_grad():
        model.halting.proj.weight.zero_()
        model.halting.proj.bias.fill_(model.halting.bias_init)
    four, many = (run(model, tokens, loops).logits for loops in (4, 64))
    assert (four - many).abs().max() > 0.1


def test_cost_is_one_core_application_a_loop_with_and_without_a_cache():
    """The original ran 3 block calls without a cache and 16 with one."""
    config = small_config(num_core_layers=1, halting=ACTConfig(bias_init=2.0))
    model = random_model(config)
    calls = []
    model.core[0].register_forward_hook(lambda *_: calls.append(1))
    tokens = random_tokens(config, 2, 6)
    run(model, tokens, 5)
    without = len(calls)
    run_cached(model, tokens, 5, [6])
    assert (without, len(calls) - without) == (5, 5)


def test_a_waiting_row_is_not_computed():
    config = small_config(num_core_layers=1)
    model = random_model(config)
    sizes = []
    model.core[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    run(model, random_tokens(config, 3, 4), torch.tensor([1, 4, 2]))
    assert sizes == [1, 1, 2, 3]


# --- mixed depths on one cache -------------------------------------------------------------------


@pytest.mark.parametrize("attention", [GQA, MLA])
def test_deeper_decode_after_a_shallow_prefill_meets_no_hole(attention):
    """The original's silent corruption (audit, defect 8): prefill at 4 loops, then decode at 8."""
    config = small_config(attention=attention)
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 2, 9)
    cache = KVCache(config, batch_size=2, max_len=9, max_loops=8, dtype=torch.float64)
    run(model, tokens[:, :8], 4, cache=cache)
    layers = config.num_core_layers
    core = cache.tensors[0][cache.core_start : cache.coda_start].unflatten(0, (8, layers))
    for loop in range(4, 8):
        torch.testing.assert_close(core[loop, ..., :8, :], core[3, ..., :8, :])
    assert (core[3, ..., :8, :].abs().amax(dim=-1) > 0).all()
    deep = run(model, tokens[:, 8:], 8, cache=cache).logits
    assert deep.isfinite().all()
    # An explicit emulation: loops 4 .. 7 see what the prefix showed at its last loop.
    by_hand = emulate_deeper_decode(model, tokens, shallow=4, deep=8)
    torch.testing.assert_close(deep, by_hand, rtol=1e-9, atol=1e-9)


def emulate_deeper_decode(
    model: RecurrentDepthLM, tokens: Tensor, *, shallow: int, deep: int
) -> Tensor:
    """The last token at ``deep`` loops; the keys of its prefix are frozen at ``shallow``."""
    prefix, last = tokens[:, :-1], tokens[:, -1:]
    with torch.no_grad():
        cache = KVCache(
            model.config,
            batch_size=len(tokens),
            max_len=tokens.shape[1],
            max_loops=shallow,
            dtype=torch.float64,
        )
        model(prefix, num_loops=shallow, ctx=model.context(prefix, cache=cache))
        ctx = model.context(last, cache=cache)
        e = model.encode(last, ctx)
        h = model.init_state(e, ctx)
        for loop in range(deep):
            h = model.step(h, e, torch.full((len(tokens),), min(loop, shallow - 1)), ctx)
        return model.decode(h, ctx)


def test_rows_of_one_cache_may_change_their_depth_at_every_token():
    config = small_config()
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 2, 6)
    plans = torch.tensor([[3, 1, 5, 2, 5, 1], [1, 4, 2, 5, 1, 3]])
    together = KVCache(config, batch_size=2, max_len=6, max_loops=5, dtype=torch.float64)
    rows = [
        KVCache(config, batch_size=1, max_len=6, max_loops=5, dtype=torch.float64) for _ in "ab"
    ]
    for t in range(6):
        both = run(model, tokens[:, t : t + 1], plans[:, t], cache=together).logits
        for index, cache in enumerate(rows):
            one = run(model, tokens[index, t][None, None], int(plans[index, t]), cache=cache).logits
            torch.testing.assert_close(both[index], one[0], rtol=1e-9, atol=1e-9)


# --- gradients -----------------------------------------------------------------------------------


def gradients(model: RecurrentDepthLM, tokens: Tensor, **options) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(tokens, **options).logits.square().sum().backward()
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("grad_loops", [3, 8])
def test_truncation_no_shorter_than_the_loops_changes_nothing(grad_loops):
    config = small_config(halting=ACTConfig(bias_init=-1.0), core_feed_forward=MOE)
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 2, 5)
    full = gradients(model, tokens, num_loops=3)
    cut = gradients(model, tokens, num_loops=3, grad_loops=grad_loops)
    for name, grad in full.items():
        assert grad is not None, name
        torch.testing.assert_close(cut[name], grad)


@pytest.mark.parametrize(
    "changes", [{"state_init": CopyInitConfig()}, {"state_init": NormalInitConfig()}]
)
def test_truncated_gradient_equals_a_hand_detached_one(changes):
    config = small_config(**changes)
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 2, 5)
    cut = gradients(model, tokens, num_loops=5, grad_loops=2)

    model.zero_grad()
    ctx = model.context(tokens)
    e = model.encode(tokens, ctx)
    h = model.init_state(e, ctx)
    for loop in range(5):
        h = model.step(h.detach() if loop <= 3 else h, e, torch.full((2,), loop), ctx)
    model.decode(h, ctx).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(cut[name], parameter.grad, msg=name)
    assert cut["prelude.0.attention.qkv.weight"].abs().max() > 0
    full = gradients(model, tokens, num_loops=5)
    assert not torch.allclose(
        full["core.0.attention.qkv.weight"], cut["core.0.attention.qkv.weight"]
    )


def test_truncation_cuts_depth_attentions_keys_as_well():
    """A loop without gradient gives keys without gradient, and a loop with one gives both."""
    model = random_model(DEPTH, dtype=torch.float64)
    tokens = random_tokens(DEPTH, 2, 5)
    cut = gradients(model, tokens, num_loops=5, grad_loops=2)
    model.zero_grad()
    ctx = model.context(tokens)
    e = model.encode(tokens, ctx)
    state = start_loops(model, e, ctx, [5, 5])
    for loop in range(5):
        if loop == 3:
            held = tuple(tuple(tensor.detach() for tensor in layer) for layer in state.recent)
            state = replace(state, h=state.h.detach(), recent=held)
        state = advance(model, state, ctx)
    model.decode(state.h, ctx).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(cut[name], parameter.grad, msg=name)
    full = gradients(model, tokens, num_loops=5)
    weight = "core.0.attention.qkv.weight"
    assert not torch.allclose(full[weight], cut[weight])


@pytest.mark.parametrize("config", [small_config(), DEPTH], ids=["plain", "depth"])
def test_truncation_cuts_the_last_loops_of_every_row(config):
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 2, 5)
    both = gradients(model, tokens, num_loops=torch.tensor([2, 5]), grad_loops=2)
    parts = [
        gradients(model, tokens[i : i + 1], num_loops=depth, grad_loops=2)
        for i, depth in enumerate((2, 5))
    ]
    for name, grad in both.items():
        torch.testing.assert_close(grad, parts[0][name] + parts[1][name])


def test_halting_head_gets_gradient_although_early_loops_have_none():
    config = small_config(halting=ACTConfig(bias_init=-1.0))
    model = random_model(config)
    out = model(random_tokens(config, 2, 5), num_loops=6, grad_loops=2)
    out.ponder_cost.sum().backward()
    assert model.halting.proj.weight.grad.abs().max() > 0
    model.zero_grad()
    grads = gradients(model, random_tokens(config, 2, 5), num_loops=6, grad_loops=2)
    assert grads["halting.proj.weight"].abs().max() > 0


def test_gradients_do_not_flow_through_a_cache():
    config = small_config()
    model = random_model(config)
    cache = KVCache(config, batch_size=1, max_len=4, max_loops=2)
    for t in range(4):
        token = random_tokens(config, 1, 1, seed=t)
        model(token, num_loops=2, ctx=model.context(token, cache=cache))
    assert not any(tensor.requires_grad for tensor in cache.tensors)


# --- dtypes --------------------------------------------------------------------------------------

FULL = {
    "gqa": small_config(core_feed_forward=MOE, halting=ACTConfig(bias_init=-1.0)),
    "mla": small_config(attention=MLA, injection=LinearInjectionConfig(), readout="linear"),
    "lora": small_config(loop_adapter=WeightLoRAConfig(rank=2, num_loops=3)),
    "universal": universal(),
    "depth": DEPTH,
    "gate": small_config(
        injection=GateInjectionConfig(), loop_adapter=OutputLoRAConfig(rank=2, num_loops=3)
    ),
    "original": small_config(injection=OriginalLTIInjectionConfig(), halting=PonderNetConfig()),
    "ouro": small_config(
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
        block=BlockConfig(norm="peri"),
        loop_norm=True,
        halting=ExitGateConfig(),
    ),
}


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_runs_and_stays_close(name, dtype):
    config = FULL[name]
    if config.core_feed_forward is not None:  # all experts: rounding must not choose other ones
        config = apply_overrides(config, ["core_feed_forward.num_experts_per_token=4"])
    model = random_model(config)
    tokens = random_tokens(config, 2, 8)
    wanted = run(model, tokens, 3).logits
    low = copy.deepcopy(model).to(dtype)
    out = run(low, tokens, 3)
    assert out.logits.dtype == out.h.dtype == dtype
    assert relative(out.logits, wanted) < (0.15 if dtype == torch.bfloat16 else 0.02)
    cached = run_cached(low, tokens, 3, [5, 1, 2])
    assert relative(cached, out.logits) < (0.15 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("name", FULL)
def test_autocast_runs_keeps_the_state_wide_and_stays_close(name):
    config = FULL[name]
    if config.core_feed_forward is not None:
        config = apply_overrides(config, ["core_feed_forward.num_experts_per_token=4"])
    model = random_model(config)
    tokens = random_tokens(config, 2, 8)
    wanted = run(model, tokens, 3).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, tokens, 3)
        ragged = run(model, tokens, torch.tensor([1, 3]))
        cached = run_cached(model, tokens, 3, [5, 1, 2])
        model(tokens, num_loops=3).logits.float().sum().backward()
    assert out.h.dtype == torch.float32
    assert relative(out.logits, wanted) < 0.15
    assert relative(ragged.logits[1], wanted[1]) < 0.15
    assert relative(cached, wanted) < 0.15
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("attention", [GQA, MLA])
def test_a_cast_there_and_back_does_not_lose_the_rotation(attention):
    """The original cast complex tables to real numbers (audit, defect 5)."""
    model = random_model(small_config(attention=attention))
    tokens = random_tokens(model.config, 2, 16)
    wanted = run(model, tokens, 3).logits
    rounded = copy.deepcopy(model)
    with torch.no_grad():  # what bf16 does to the weights, without any cast of the module
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    cast = run(model.to(torch.bfloat16).to(torch.float32), tokens, 3).logits
    torch.testing.assert_close(cast, run(rounded, tokens, 3).logits)
    assert relative(cast, wanted) < 0.1
    moved = tokens.clone()
    moved[:, [0, 1]] = tokens[:, [1, 0]]
    assert not torch.allclose(run(model, moved, 3).logits[:, -1], cast[:, -1])


def test_no_complex_buffer_and_no_table_in_the_state():
    model = random_model(FULL["gqa"])
    assert not any(buffer.is_complex() for buffer in model.buffers())
    assert all(
        tensor.shape[:1] != (model.config.max_seq_len,) for tensor in model.state_dict().values()
    )
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    assert buffers == ["core.0.feed_forward.bias", "core.1.feed_forward.bias"]


# --- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "peri"])
@pytest.mark.parametrize("attention", [GQA, MLA])
@pytest.mark.parametrize("feed_forward", [None, MOE])
def test_the_core_starts_as_the_identity(norm, attention, feed_forward):
    config = small_config(
        attention=attention,
        block=BlockConfig(norm=norm),
        core_feed_forward=feed_forward,
        injection=NoInjectionConfig(),
        loop_adapter=WeightLoRAConfig(rank=2, num_loops=2),
    )
    model = RecurrentDepthLM(config)
    tokens = random_tokens(config, 2, 5)
    ctx = model.context(tokens)
    h = torch.randn(2, 5, 16)
    assert torch.equal(model.step(h, h, torch.tensor([0, 1]), ctx), h)


@pytest.mark.parametrize("norm", ["pre", "peri", "sandwich"])
def test_first_gradients_are_of_ordinary_size(norm):
    """The norm of a zero branch would have a gradient of 1/sqrt(eps) = 1000."""
    config = small_config(block=BlockConfig(norm=norm))
    model = RecurrentDepthLM(config)
    tokens = random_tokens(config, 4, 16)
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert 0 < max(norms) < 10


def test_looping_starts_as_the_linear_recursion():
    config = small_config()
    model = RecurrentDepthLM(config)
    tokens = random_tokens(config, 2, 5)
    ctx = model.context(tokens)
    e, h = model.encode(tokens, ctx), torch.zeros(2, 5, 16)
    decay = model.injection.decay()
    for loop in range(4):
        h = decay * h + e
        torch.testing.assert_close(model(tokens, num_loops=loop + 1).h, h)


def test_initial_weights_come_from_the_seed_alone():
    config = small_config(core_feed_forward=MOE, loop_adapter=WeightLoRAConfig(rank=2, num_loops=2))
    first = RecurrentDepthLM(config, 1).state_dict()
    torch.manual_seed(123)
    again = RecurrentDepthLM(config, 1).state_dict()
    other = RecurrentDepthLM(config, 2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_a_model_on_the_meta_device_costs_nothing():
    config = small_config(d_model=65536, vocab_size=2**20)
    with torch.device("meta"):
        model = RecurrentDepthLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", [0, -1, 2.5, torch.tensor([1, 0]), torch.tensor([1, 1, 1])])
def test_a_depth_below_one_is_refused(loops):
    """The original took 0 as "the default"."""
    model = RecurrentDepthLM(small_config())
    cache = KVCache(model.config, batch_size=2, max_len=8, max_loops=2)
    tokens = random_tokens(model.config, 2, 4)
    ctx = model.context(tokens, cache=cache)
    with (
        unchecked(),
        pytest.raises(ValueError, match=r"num_loops is .*; it must be an integer of at l"),
    ):
        model(tokens, num_loops=loops, ctx=ctx)


@pytest.mark.parametrize(
    "loops", [2, np.int64(2), torch.tensor(2), [2, 2], (2, np.int64(2)), np.array([2, 2])], ids=str
)
def test_integers_of_any_kind_are_numbers_of_loops(loops):
    model = random_model(small_config())
    tokens = random_tokens(model.config, 2, 4)
    with unchecked():
        got = model(tokens.tolist(), num_loops=loops, grad_loops=np.int64(1)).logits
    assert torch.equal(got, model(tokens, num_loops=2).logits)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"num_loops": x} for x in (True, 2.0, "2", b"22", [2], [2, 2.0])),
        *({"num_loops": x} for x in ([[2, 2]], 10**30, 2**20)),
        *({"num_loops": x} for x in (torch.tensor([2.0, 2.0]), torch.tensor([True, True]), {})),
        *({"grad_loops": x} for x in (0, -1, 1.5, True, "1", [1], torch.tensor([1, 1]))),
        *({"ctx": x} for x in (1, "ctx", {}, torch.zeros(2, 4))),
        *({"tokens": x} for x in (None, "ab", torch.zeros(2, 4), torch.zeros(4).long())),
    ],
    ids=str,
)
def test_arguments_of_other_types_are_refused_in_a_line(wrong):
    model = random_model(small_config())
    given = {"tokens": random_tokens(model.config, 2, 4), **wrong}
    start = f"^{next(iter(wrong))} is .* must be"
    with unchecked(), pytest.raises(ValueError, match=start) as error:
        model(**given)
    assert "\n" not in str(error.value)


def test_tokens_of_another_shape_than_the_contexts_are_refused():
    model = random_model(small_config())
    tokens = random_tokens(model.config, 2, 4)
    with pytest.raises(ValueError, match=r"tokens is .* \[2, 3\]'; it must be .* \[2, 4\]"):
        model(tokens[:, :3], ctx=model.context(tokens))


def test_more_loops_than_the_cache_has_are_refused():
    model = RecurrentDepthLM(small_config())
    cache = KVCache(model.config, batch_size=1, max_len=8, max_loops=2)
    tokens = random_tokens(model.config, 1, 4)
    with pytest.raises(
        ValueError, match="num_loops is 3; it must be at most the cache's max_loops=2"
    ):
        model(tokens, num_loops=3, ctx=model.context(tokens, cache=cache))


# --- compilation ---------------------------------------------------------------------------------

COMPILED = {
    "depth": small_config(
        num_prelude_layers=0,
        num_core_layers=1,
        num_coda_layers=0,
        depth_attention=DepthAttentionConfig(num_recent_loops=2),
    ),
    "universal": universal(num_core_layers=1),
    "gqa": small_config(num_prelude_layers=0, num_core_layers=1, num_coda_layers=0),
    "mla": small_config(num_prelude_layers=0, num_core_layers=1, num_coda_layers=0, attention=MLA),
    "moe": small_config(
        num_prelude_layers=0,
        num_core_layers=1,
        num_coda_layers=0,
        core_feed_forward=MoEConfig(
            num_experts=4, num_experts_per_token=2, d_expert=8, bias_loops=2
        ),
        loop_adapter=WeightLoRAConfig(rank=2, num_loops=2),
    ),
}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def counting_compiler(fresh_compiler):
    torch._dynamo.utils.counters.clear()
    with unchecked():
        yield


# Dynamo itself looks at .grad of h_1.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("training", [False, True])
def test_one_compiled_step_serves_every_depth(name, training, counting_compiler):
    model = random_model(COMPILED[name]).train(training)
    tokens = random_tokens(model.config, 2, 4)
    eager = [model(tokens, num_loops=loops).logits for loops in (2, 3, 7)]
    ragged = model(tokens, num_loops=torch.tensor([5, 5])).logits
    model.step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        for loops, wanted in zip((2, 3, 7), eager, strict=True):
            got = model(tokens, num_loops=loops).logits
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            if loops == 2:
                first = graphs()
            if training:
                got.sum().backward()
        assert graphs() == first <= (2 if training else 1)  # h_0 needs no gradient, h_1 does
        got = model(tokens, num_loops=torch.tensor([5, 5])).logits
        torch.testing.assert_close(got, ragged, rtol=1e-4, atol=1e-5)
        assert graphs() == first


@pytest.mark.slow
def test_the_default_compiler_gives_the_eager_logits(compiler, counting_compiler):
    model = random_model(COMPILED["moe"])
    tokens = random_tokens(model.config, 2, 4)
    wanted = run(model, tokens, 3).logits
    model.step = torch.compile(model.step, fullgraph=True)
    torch.testing.assert_close(run(model, tokens, 3).logits, wanted, rtol=1e-4, atol=1e-5)


def test_config_of_a_model_is_the_one_given():
    config: ModelConfig = small_config(injection=AddInjectionConfig())
    assert RecurrentDepthLM(config).config is config


# --- transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [None, MOE])
def test_gradients_by_torch_func_are_those_of_autograd(tied, experts):
    config = small_config(
        tie_embeddings=tied, core_feed_forward=experts, halting=ACTConfig(bias_init=-1.0)
    )
    model = random_model(config, dtype=torch.float64).train()
    tokens = random_tokens(config, 2, 5)
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (tokens,), {"num_loops": 3}).logits.square().mean()

    with unchecked():
        found = torch.func.grad(loss)(params)
        model(tokens, num_loops=3).logits.square().mean().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], param.grad, msg=name)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's attention
@pytest.mark.parametrize("experts", [None, MOE])
def test_gradients_per_sample_by_torch_func(experts):
    config = small_config(halting=ACTConfig(bias_init=-1.0), core_feed_forward=experts)
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(model.config, 3, 5)
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        output = functional_call(model, params, (row[None],), {"num_loops": 2})
        return output.logits.square().mean()

    with unchecked():
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, tokens)
        for row, each in enumerate(tokens):
            alone = torch.func.grad(loss)(params, each)
            for name, gradient in alone.items():
                torch.testing.assert_close(found[name][row], gradient, msg=name)


def test_a_forward_can_be_exported_and_its_output_is_a_tree():
    model = random_model(small_config(core_feed_forward=MOE, halting=PonderNetConfig()))
    tokens = random_tokens(model.config, 2, 5)
    expected = model(tokens, num_loops=3, keep_states=True)
    with unchecked(), torch.no_grad():
        options = {"num_loops": 3, "keep_states": True}
        program = torch.export.export(model, (tokens,), options, strict=False)
        output = program.module()(tokens, **options)
    assert type(output) is ModelOutput and len(output.states) == 3
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.exit_weights, expected.exit_weights)
    doubled = tree_map_only(Tensor, lambda tensor: 2 * tensor, expected)
    assert torch.equal(doubled.h, 2 * expected.h) and doubled.ponder_cost is not None


# --- activation checkpointing --------------------------------------------------------------------


RECOMPUTED = {
    "plain": {},
    "depth attention": {"depth_attention": DepthAttentionConfig(num_recent_loops=2)},
    "lora": {"loop_adapter": WeightLoRAConfig(rank=2, num_loops=2)},
    "act": {"halting": ACTConfig(bias_init=-1.0)},
    "experts": {"core_feed_forward": MOE},
}
RECOMPUTED["all"] = {key: part for parts in RECOMPUTED.values() for key, part in parts.items()}


@pytest.mark.parametrize("parts", RECOMPUTED.values(), ids=RECOMPUTED)
@pytest.mark.parametrize("grad_loops", [None, 2])
def test_recomputed_loops_have_the_same_gradients_and_load(parts, grad_loops):
    model = random_model(small_config(**parts), dtype=torch.float64).train()
    tokens = random_tokens(model.config, 3, 6)
    ctx = {"documents": torch.tensor([[0, 0, 0, 1, 1, -1]] * 3)}
    found = []
    for recompute in (False, True):
        model.zero_grad()
        output = model(
            tokens,
            num_loops=torch.tensor([4, 2, 3]),
            grad_loops=grad_loops,
            ctx=model.context(tokens, **ctx),
            keep_states=True,
            recompute=recompute,
        )
        loss = output.logits.square().mean() + output.states[-2].square().mean()
        if output.ponder_cost is not None:
            loss = loss + output.ponder_cost.mean()
        loss.backward()
        load = [part.load.clone() for part in model.modules() if isinstance(part, MoE)]
        for part in model.modules():
            if isinstance(part, MoE):
                part.update_bias(0.0)
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}, load))
    (loss, grads, load), (loss_again, grads_again, load_again) = found
    assert torch.equal(loss, loss_again)
    for name, grad in grads.items():
        assert (grad is None) == (grads_again[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads_again[name], grad, rtol=1e-12, atol=1e-14, msg=name)
    assert all(map(torch.equal, load, load_again))
    assert all(part.sum() > 0 for part in load)


def test_a_cache_and_recomputed_loops_exclude_each_other():
    model = random_model(small_config())
    tokens = random_tokens(model.config, 1, 3)
    cache = KVCache(model.config, batch_size=1, max_len=4, max_loops=4)
    with pytest.raises(ValueError, match="recompute is True; it must be False with a cache"):
        model(tokens, ctx=model.context(tokens, cache=cache), recompute=True)
    assert cache.lengths == [0]


def test_recomputed_loops_keep_their_states_only():
    """Counted in bytes that autograd stores, so that no allocator has a say."""
    model = random_model(small_config(core_feed_forward=MOE)).train()
    tokens = random_tokens(model.config, 2, 32)

    def stored(num_loops: int, recompute: bool) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(tokens, num_loops=num_loops, recompute=recompute)
        assert output.logits.requires_grad
        return sum(kept.values())

    state = 2 * 32 * 16 * 4
    per_loop = (stored(8, True) - stored(4, True)) / 4
    assert per_loop <= state < (stored(8, False) - stored(4, False)) / 4 / 10
