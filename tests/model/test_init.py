import hashlib
import math
import typing

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos.config import (
    BlockConfig,
    CopyInitConfig,
    GateInjectionConfig,
    NormalInitConfig,
    PonderNetConfig,
    StateInitConfig,
    SwiGLUConfig,
    ZerosInitConfig,
)
from openmythos.model.cache import KVCache
from openmythos.model.init import (
    CUT,
    STATE_INITS,
    init_weights,
    normal_rows,
    truncated_normal,
)
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import MLA, MOE, small_config


def initial_state(part, e, ctx):
    return STATE_INITS[type(part)](part, e, ctx)


NOISY = small_config(state_init=NormalInitConfig(), max_seq_len=4096)


def state(tokens=64, dim=64, *, rows=1, std=1.0, dtype=torch.float32, **options):
    """The seeded state of some rows; ``options`` are the context's."""
    model = RecurrentDepthLM(NOISY)
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    e = torch.zeros(rows, tokens, dim, dtype=dtype)
    return initial_state(NormalInitConfig(std=std), e, model.context(ids, **options))


# --- the seeded normal state ---------------------------------------------------------------------


def test_the_state_is_the_same_in_every_batch_chunk_padding_pack_and_cache():
    alone = state(10, seeds=7)[0]
    batch = state(10, rows=3, seeds=[1, 2**64 - 1, 7])
    assert torch.equal(batch[2], alone)
    assert not torch.equal(batch[1], alone)
    assert torch.equal(batch[1], state(10, seeds=-1)[0])  # as torch.Generator reads seeds
    mask = torch.arange(15)[None] >= 5
    assert torch.equal(state(15, seeds=7, padding_mask=mask)[0, 5:], alone)
    assert torch.equal(state(4, seeds=7, positions=torch.arange(6, 10)[None])[0], alone[6:])
    documents = torch.tensor([[0] * 5 + [1] * 10 + [2] * 3])
    seeds = torch.tensor([[3] * 5 + [7] * 10 + [4] * 3])
    packed = state(18, seeds=seeds, documents=documents)[0]
    assert torch.equal(packed[5:15], alone)
    assert torch.equal(packed[:5], state(5, seeds=3)[0])
    cache = KVCache(NOISY, batch_size=2, max_len=10, max_loops=1)
    model, parts = RecurrentDepthLM(NOISY), []
    for width in (3, 6, 1):
        ids = torch.zeros(2, width, dtype=torch.int64)
        ctx = model.context(ids, cache=cache, seeds=[4, 7])
        parts.append(initial_state(NormalInitConfig(), torch.zeros(2, width, 64), ctx)[1])
        model(ids, num_loops=1, ctx=ctx)
    assert torch.equal(torch.cat(parts), alone)
    assert torch.equal(state(10, rows=2, seeds=[9, 7])[[1, 0]], state(10, rows=2, seeds=[7, 9]))


def test_rows_of_a_context_keep_their_seeds_when_they_are_selected():
    model = RecurrentDepthLM(NOISY)
    ctx = model.context(torch.zeros(3, 4, dtype=torch.int64), seeds=[5, 6, 7])
    assert ctx.select([2, 0]).seeds.tolist() == [[7], [5]]
    with pytest.raises(ValueError, match=r"shape of seeds is \(2, 1\); it must be one of"):
        model.context(torch.zeros(3, 4, dtype=torch.int64), seeds=[5, 6])


def test_the_state_is_a_truncated_normal():
    x = state(512, 256, seeds=3, std=2.0, dtype=torch.float64).flatten() / 2.0
    assert x.abs().max() <= 3
    # A normal cut at 3 sigma: variance 1 - 6 pdf(3) / (2 cdf(3) - 1), kurtosis 2.836 there.
    pdf, mass = math.exp(-4.5) / math.sqrt(2 * math.pi), math.erf(3 / math.sqrt(2))
    variance = 1 - 6 * pdf / mass
    kurtosis = (3 * mass - 2 * pdf * (27 + 9)) / mass / variance**2
    assert float(x.mean()) == pytest.approx(0, abs=0.012)
    assert float(x.var()) == pytest.approx(variance, abs=0.02)
    assert float(x.pow(3).mean()) == pytest.approx(0, abs=0.03)
    assert float(x.pow(4).mean() / x.var() ** 2) == pytest.approx(kurtosis, abs=0.05)
    assert len(x.unique()) > 0.99 * len(x)
    # Kolmogorov and Smirnov's distance to the exact distribution
    exact = (0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2))) - 0.5) / mass + 0.5
    steps = torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x)
    assert float((exact - steps).abs().max()) < 1.6 / math.sqrt(len(x))


def test_the_rational_approximation_is_the_inverse_of_the_distribution():
    """Sorted, a million numbers are the exact quantiles of the fractions that they stand for."""
    low = torch.arange(4096)
    x = truncated_normal((low, torch.zeros_like(low)), 256).double().flatten()
    share = torch.erf(x / math.sqrt(2)) / math.erf(CUT / math.sqrt(2))  # in (-1, 1), on a grid
    grid = ((share * 2**24 - 1) / 2).round() * 2 + 1
    exact = torch.erfinv(grid / 2**24 * math.erf(CUT / math.sqrt(2))) * math.sqrt(2)
    assert float((x - exact).abs().max()) < 1e-5
    assert float(x.abs().max()) > 2.99


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        assert not (isinstance(made, torch.Tensor) and made.dtype == torch.float64), func
        assert "erf" not in str(func)
        return made


def test_no_number_is_made_in_float64():
    with _NoFloat64():
        key = torch.arange(4), torch.arange(4)
        truncated_normal(key, 8)
        normal_rows(0, "a", torch.arange(4), 8)


def test_the_numbers_stay_what_they_are():
    """Bit for bit, because runs and exports are repeated from their seeds."""
    drawn = state(16, 16, seeds=5), normal_rows(5, "embed.weight", torch.arange(16), 16)
    digests = [hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] for x in drawn]
    assert digests == ["2868c09e1b3b6ef1", "4df4970c87455d0f"]


def test_positions_channels_and_seeds_are_uncorrelated():
    x = state(64, 2048)[0]
    limit = 5.5 / math.sqrt(2048)
    across = torch.corrcoef(x) - torch.eye(64)
    assert across.abs().max() < limit
    for shift in (1, 2, 7):  # nor is a position another one's noise, moved by some channels
        moved = torch.corrcoef(torch.cat((x, x.roll(shift, dims=1))))[:64, 64:]
        assert moved.abs().max() < limit
    other = state(64, 2048, seeds=1)[0]
    assert torch.corrcoef(torch.cat((x, other)))[:64, 64:].abs().max() < limit
    channels = torch.corrcoef(state(2048, 64)[0].T) - torch.eye(64)
    assert channels.abs().max() < limit


def test_zeros_and_copy():
    assert set(STATE_INITS) == set(typing.get_args(StateInitConfig))
    e = torch.randn(2, 3, 4)
    ctx = RecurrentDepthLM(NOISY).context(torch.zeros(2, 3, dtype=torch.int64))
    assert not initial_state(ZerosInitConfig(), e, ctx).any()
    assert torch.equal(initial_state(CopyInitConfig(), e, ctx), e)


# --- the weights ---------------------------------------------------------------------------------


def test_weights_depend_on_seed_name_and_row_alone():
    """A stage without the rest, and one with other layers before it, has the same weights."""
    torch.manual_seed(1)
    base = RecurrentDepthLM(small_config(core_feed_forward=MOE), 3).state_dict()
    torch.manual_seed(2)
    other = RecurrentDepthLM(small_config(core_feed_forward=MOE, num_prelude_layers=2), 3)
    found = other.state_dict()
    assert all(torch.equal(found[name], value) for name, value in base.items())
    for seed, same in ((3, True), (4, False)):
        again = RecurrentDepthLM(small_config(core_feed_forward=MOE), seed)
        assert torch.equal(again.embed.weight, base["embed.weight"]) == same
    # in another order of construction
    backwards = torch.nn.Module()
    for name, module in reversed(list(RecurrentDepthLM(small_config()).named_children())):
        backwards.add_module(name, module)
    init_weights(backwards, small_config().d_model, 3)
    plain = RecurrentDepthLM(small_config(), 3).state_dict()
    found = backwards.state_dict()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_a_shard_of_rows_is_drawn_alone():
    config = small_config(core_feed_forward=MOE)
    model, std = RecurrentDepthLM(config, 3), math.sqrt(2 / (5 * config.d_model))
    name = "core.0.feed_forward.gate_up"
    _, width, dim = (whole := model.get_parameter(name).detach()).shape
    part = normal_rows(3, name, torch.arange(width, 3 * width), dim)
    assert torch.equal((std * part).view(2, width, dim), whole[1:3])
    rows = normal_rows(3, "embed.weight", torch.arange(5, 9), dim)
    assert torch.equal(std * rows, model.embed.weight[5:9])
    many = normal_rows(3, "embed.weight", torch.arange(70_000), 2)
    assert torch.equal(normal_rows(3, "embed.weight", torch.arange(69_990, 70_000), 2), many[-10:])


@pytest.mark.parametrize("attention", [{}, {"attention": MLA}])
def test_matrices_are_scaled_and_outputs_zero(attention):
    config = small_config(
        d_model=128,
        vocab_size=512,
        feed_forward=SwiGLUConfig(d_ff=256),
        core_feed_forward=MOE,
        **attention,
    )
    model = RecurrentDepthLM(config)
    std = math.sqrt(2 / (5 * 128))
    for name, parameter in model.named_parameters():
        if (
            name.endswith(("out.weight", "down"))
            or "feed_forward.down" in name
            or "shared.down" in name
        ):
            assert not parameter.any(), name
        elif parameter.ndim >= 2 and not name.startswith("injection"):
            if parameter.numel() > 1000:
                assert float(parameter.detach().std()) == pytest.approx(std, rel=0.1), name
            assert parameter.abs().max() <= 3 * std
        elif "norm" in name:
            assert (parameter == 1).all()


def test_biases_start_where_the_config_says():
    config = small_config(halting=PonderNetConfig(bias_init=-1.5), injection=GateInjectionConfig())
    model = RecurrentDepthLM(config)
    assert not model.halting.proj.weight.any()
    assert float(model.halting.proj.bias.detach()) == -1.5
    assert (model.injection.gate.bias == -2).all()


def test_where_a_norm_ends_the_branch_its_weight_is_zero():
    model = RecurrentDepthLM(small_config(block=BlockConfig(norm="peri"), core_feed_forward=MOE))
    for block in (*model.prelude, *model.core, *model.coda):
        assert not block.attention_out_norm.weight.any()
        assert not block.feed_forward_out_norm.weight.any()
        assert block.attention.out.weight.any()
