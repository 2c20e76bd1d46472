import contextlib
import copy
import typing
from functools import partial
from unittest import mock

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from openmythos.config import FeedForwardConfig, MoEConfig, ReLUSquaredConfig, SwiGLUConfig
from openmythos.model.cache import KVCache
from openmythos.model.feedforward import (
    FEED_FORWARDS,
    MoE,
    ReLUSquared,
    SwiGLU,
    make_feed_forward,
    max_violation,
)
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.moe import moe_experts
from tests.strategies import MOE, random_model, random_tokens, randomise, seeded, small_config


@pytest.mark.parametrize("width", [6, 32])  # the second is one pass of our kernel
def test_swiglu_by_its_formula(width):
    layer, x = (
        SwiGLU(small_config(d_model=4), SwiGLUConfig(d_ff=width)),
        torch.randn(2, 3, 4, requires_grad=True),
    )
    gate, up = layer.gate_up.weight.split(width)
    wanted = (functional.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), wanted)
    leaves = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (layer(x), wanted))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_relu_squared_by_its_formula():
    x = torch.randn(2, 3, 4)
    for scale in (1.0, 0.5):
        layer = ReLUSquared(small_config(d_model=4), ReLUSquaredConfig(d_ff=6, scale=scale))
        hidden = scale * (x @ layer.up.weight.T).clamp(min=0) ** 2
        torch.testing.assert_close(layer(x), hidden @ layer.down.weight.T)


def test_the_config_chooses_the_feed_forward():
    assert set(FEED_FORWARDS) == set(typing.get_args(FeedForwardConfig))
    for part, made_class in (
        (MoEConfig(num_experts=2, num_experts_per_token=1, d_expert=4), MoE),
        (SwiGLUConfig(d_ff=4), SwiGLU),
        (ReLUSquaredConfig(d_ff=4), ReLUSquared),
    ):
        assert type(make_feed_forward(small_config(), part, None)) is made_class


# --- mixture of experts --------------------------------------------------------------------------

DIM = 16


def made(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> MoE:
    fields = {"num_experts": 6, "num_experts_per_token": 2, "d_expert": 8}
    moe = MoE(small_config(d_model=DIM), MoEConfig(**{**fields, **changes}))
    randomise(moe, seed)
    return moe.to(dtype).eval()


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=seeded(seed), dtype=torch.float64).to(dtype)


def naive(moe: MoE, x: torch.Tensor, loops: torch.Tensor | None = None) -> torch.Tensor:
    """Token by token, expert by expert, from the paper."""
    part, out = moe.config, torch.zeros_like(x)
    for b, row in enumerate(x):
        bias = moe.bias[0 if loops is None else min(int(loops[b]), part.bias_loops - 1)]
        for t, token in enumerate(row):
            logits = moe.router.weight @ token
            if part.scoring == "sigmoid":
                scores, selection = logits.sigmoid(), logits.sigmoid() + bias
            else:
                scores, selection = logits.softmax(dim=0), logits + bias
            chosen = selection.topk(part.num_experts_per_token).indices
            for expert in chosen:
                gate, up = (moe.gate_up[expert] @ token).chunk(2)
                y = moe.down[expert] @ (functional.silu(gate) * up)
                out[b, t] += part.routed_scale * scores[expert] / scores[chosen].sum() * y
            if moe.shared is not None:
                out[b, t] += moe.shared(token[None, None])[0, 0]
    return out


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_equals_a_loop_over_tokens(scoring, num_shared_experts):
    moe = made(
        scoring=scoring, num_shared_experts=num_shared_experts, routed_scale=2.5, bias_loops=3
    )
    x, loops = inputs(3, 5), torch.tensor([0, 2, 7])
    torch.testing.assert_close(moe(x, loops), naive(moe, x, loops))
    torch.testing.assert_close(moe(x), naive(moe, x))


def test_no_token_is_dropped_even_if_all_choose_the_same_experts():
    moe = made(num_shared_experts=0)
    moe.bias.zero_()
    moe.bias[0, 3] = moe.bias[0, 5] = 100.0
    x = inputs(4, 8)
    assert (moe(x).abs().amax(dim=-1) > 0).all()
    torch.testing.assert_close(moe(x), naive(moe, x))
    moe.train()(x)
    assert moe.load.tolist() == [[0, 0, 0, 32, 0, 32]]


def test_a_tokens_output_does_not_depend_on_its_neighbours():
    moe = made()
    x = inputs(4, 8)
    together = moe(x)
    for b in range(4):
        for t in (0, 7):
            torch.testing.assert_close(moe(x[b : b + 1, t : t + 1])[0, 0], together[b, t])
    order = torch.randperm(4, generator=seeded())
    torch.testing.assert_close(moe(x[order]), together[order])


def test_the_bias_chooses_and_does_not_weigh():
    moe = made(num_experts_per_token=6)  # all are chosen: the bias can change nothing
    x = inputs(2, 5)
    row = torch.zeros(10, dtype=torch.int64)
    before = moe(x)
    moe.bias.copy_(torch.randn(1, 6, generator=seeded(5)))
    torch.testing.assert_close(moe(x), before)
    moe = made()
    _, weight, _ = moe.route(x.flatten(0, 1), row)
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(10, dtype=torch.float64))


def test_the_bias_has_no_gradient_and_the_router_has():
    moe = made()
    moe(inputs(2, 5)).square().sum().backward()
    assert not moe.bias.requires_grad
    assert "bias" not in dict(moe.named_parameters())
    assert moe.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("rate", [0.001, 0.5])
def test_the_bias_moves_by_the_rate_against_overload(rate):
    moe = made(num_experts=4, bias_loops=3)
    moe.bias.zero_()
    moe.load.copy_(torch.tensor([[9, 1, 5, 5], [0, 0, 0, 0], [3, 0, 0, 1]]))
    moe.update_bias(rate)
    wanted = torch.tensor([[-1.0, 1, 0, 0], [0, 0, 0, 0], [-1, 1, 1, 0]]) * rate
    torch.testing.assert_close(moe.bias, wanted)
    assert not moe.load.any()
    moe.update_bias(rate)  # nothing seen since: nothing moves
    torch.testing.assert_close(moe.bias, wanted)


def test_statistics_are_kept_for_every_loop_and_only_in_training():
    moe = made(bias_loops=2).train()
    x, loops = inputs(4, 5), torch.tensor([0, 1, 1, 6])
    moe(x, loops)
    assert moe.load.sum(dim=1).tolist() == [10, 30]
    moe(x, loops)
    assert moe.load.sum() == 80
    moe.eval()(x, loops)
    assert moe.load.sum() == 80
    assert "load" not in moe.state_dict()


def test_rows_at_different_loops_use_their_own_bias():
    moe = made(bias_loops=2)
    moe.bias.zero_()
    moe.bias[1, 0] = 100.0
    expert, _, _ = moe.route(inputs(40), torch.arange(40) % 2)
    chosen = (expert == 0).any(dim=-1)
    assert chosen[1::2].all()
    assert not chosen[0::2].all()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_updates_balance_a_skewed_router(scoring):
    moe = made(torch.float32, num_experts=8, scoring=scoring).train()
    moe.bias.zero_()
    # A common direction that the router likes for expert 0 and dislikes for expert 1.
    common = torch.ones(DIM)
    with torch.no_grad():
        moe.router.weight[0] += 0.1 * common
        moe.router.weight[1] -= 0.1 * common
    violations = []
    for step in range(300):
        x = inputs(1, 256, dtype=torch.float32, seed=step) + common
        moe.route(x[0], torch.zeros(256, dtype=torch.int64))
        violations.append(float(max_violation(moe.load)[0]))
        moe.update_bias(0.01)
    first, last = sum(violations[:5]) / 5, sum(violations[-20:]) / 20
    assert first > 1
    assert last < 0.5


def test_max_violation_by_hand():
    load = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 4, 2, 2]])
    assert max_violation(load).tolist() == [0, 3, 1]


def test_scores_that_all_round_to_zero_do_not_divide_by_zero():
    moe = made(torch.float32)
    with torch.no_grad():
        moe.router.weight.fill_(-100.0)
    assert moe(torch.ones(1, 2, DIM)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_leaves_the_bias_precise(dtype):
    """A step of 0.001 on a bias of 0.5 is lost in bf16."""
    moe = made(torch.float32)
    moe.bias.fill_(0.5)
    moe.to(dtype)
    assert moe.router.weight.dtype == dtype
    assert moe.bias.dtype == torch.float32
    moe.load[0, 0] = 5
    moe.update_bias(0.001)
    assert float(moe.bias[0, 0]) == pytest.approx(0.499, abs=1e-6)
    assert moe(inputs(1, 3, dtype=dtype)).dtype == dtype
    with torch.device("meta"):
        empty = MoE(small_config(d_model=DIM), moe.config)
    assert empty.to(dtype).bias.is_meta
    assert not empty.to_empty(device="cpu").bias.is_meta


def test_autocast_runs_the_experts_low_and_the_router_wide():
    moe = made(torch.float32)
    x = inputs(2, 40, dtype=torch.float32)
    row = torch.zeros(80, dtype=torch.int64)
    wanted = moe.route(x.flatten(0, 1), row)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe.route(x.flatten(0, 1), row)
        y = moe(x)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), moe(x), rtol=0.05, atol=0.05)


def test_low_precision_routes_like_its_own_rounded_weights():
    moe = made(torch.float32)
    low = copy.deepcopy(moe).to(torch.bfloat16)
    x = inputs(1, 20, dtype=torch.bfloat16)
    rounded = copy.deepcopy(moe)
    with torch.no_grad():
        rounded.router.weight.copy_(low.router.weight)
    row = torch.zeros(20, dtype=torch.int64)
    assert torch.equal(low.route(x[0], row)[0], rounded.route(x[0].float(), row)[0])


def test_experts_shared_by_the_loops_of_a_forward_get_every_loops_gradient():
    """Loops without gradient come first and must not leave weights without a graph behind."""
    model = RecurrentDepthLM(small_config(core_feed_forward=MOE))
    randomise(model)
    tokens = torch.randint(0, 32, (2, 5))
    for grad_loops in (None, 2):
        found = []
        for patch in (contextlib.nullcontext(), mock.patch.object(MoE, "experts", whole)):
            model.zero_grad(set_to_none=True)
            with patch:
                logits = model(tokens, num_loops=4, grad_loops=grad_loops).logits
            logits.square().sum().backward()
            found.append([parameter.grad.clone() for parameter in model.core.parameters()])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
        assert all(grad.abs().max() > 0 for grad in found[0])


def whole(moe: MoE, ctx: object) -> partial[torch.Tensor]:
    return partial(moe_experts, gate_up=moe.gate_up, down=moe.down)


def test_padding_does_not_count_in_the_load():
    config = small_config(core_feed_forward=MOE)
    model = random_model(config).train()
    tokens = random_tokens(config, 2, 6)
    (layer, *_) = [module for module in model.modules() if isinstance(module, MoE)]
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    found = []
    for options in (
        {"padding_mask": real},
        {"documents": torch.where(real, 3, -1)},
        {"padding_mask": real, "cache": KVCache(config, batch_size=2, max_len=6, max_loops=4)},
    ):
        model(tokens, num_loops=torch.tensor([2, 1]), ctx=model.context(tokens, **options))
        found.append(layer.load.clone())
        layer.load.zero_()
    assert found[0].sum() == (2 * 4 + 1 * 5) * MOE.num_experts_per_token
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for row, depth in ((0, 2), (1, 1)):
        model(tokens[row : row + 1, real[row]], num_loops=depth)
    assert torch.equal(found[0], layer.load)


def test_the_balancing_bias_is_precise_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = RecurrentDepthLM(small_config(core_feed_forward=MOE)).core[0].feed_forward
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.gate_up.dtype == torch.bfloat16 and layer.bias.dtype == torch.float32
    layer.bias += 1.0
    layer.load[0, 0] = 5
    layer.update_bias(1e-3)
    assert layer.bias[0].tolist() == pytest.approx([0.999, *[1.001] * 3])


def test_one_context_serves_changed_weights():
    model = random_model(small_config(core_feed_forward=MOE))
    tokens = random_tokens(model.config, 2, 5)
    other = random_model(model.config, seed=1)
    ctx, fresh = model.context(tokens), other(tokens).logits
    before = model(tokens, ctx=ctx).logits
    swapped = functional_call(model, other.state_dict(), (tokens,), {"ctx": ctx})
    torch.testing.assert_close(swapped.logits, fresh)
    theirs = other.state_dict()
    for name, ours in model.state_dict(keep_vars=True).items():
        ours.data = theirs[name].clone()
    torch.testing.assert_close(model(tokens, ctx=ctx).logits, fresh)
    assert not torch.allclose(before, fresh)
