import math
import typing

import pytest
import torch

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
from openmythos.model.init import STATE_INITS, initial_state
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import MLA, MOE, seeded, small_config


def noise(rows=1, tokens=64, dim=64, *, seed=0, std=1.0, first=0, dtype=torch.float64):
    positions = torch.arange(first, first + tokens).expand(rows, -1)
    e = torch.zeros(rows, tokens, dim, dtype=dtype)
    return initial_state(NormalInitConfig(std=std), e, positions, seeded(seed))


# --- the seeded normal state ---------------------------------------------------------------------


def test_the_state_is_the_same_in_every_batch_chunk_and_padding():
    whole = noise(tokens=10)
    assert torch.equal(noise(tokens=10), whole)
    assert torch.equal(noise(rows=3, tokens=10)[2:], whole)
    assert torch.equal(noise(tokens=4, first=6), whole[:, 6:])
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    padded = initial_state(NormalInitConfig(), torch.zeros(1, 5, 64).double(), positions, seeded())
    assert torch.equal(padded[:, 2:], whole[:, :3])


def test_the_state_is_a_truncated_normal():
    x = noise(tokens=512, dim=256, seed=3, std=2.0).flatten() / 2.0
    assert x.abs().max() <= 3
    # A normal cut at 3 sigma: variance 1 - 6 pdf(3) / (2 cdf(3) - 1), kurtosis 2.836 there.
    pdf, mass = math.exp(-4.5) / math.sqrt(2 * math.pi), math.erf(3 / math.sqrt(2))
    variance = 1 - 6 * pdf / mass
    kurtosis = (3 * mass - 2 * pdf * (27 + 9)) / mass / variance**2
    assert float(x.mean()) == pytest.approx(0, abs=0.012)
    assert float(x.var()) == pytest.approx(variance, abs=0.02)
    assert float(x.pow(3).mean()) == pytest.approx(0, abs=0.03)
    assert float(x.pow(4).mean() / x.var() ** 2) == pytest.approx(kurtosis, abs=0.05)
    assert len(x.unique()) > 0.999 * len(x)


def test_positions_channels_and_seeds_are_uncorrelated():
    x = noise(tokens=64, dim=2048)[0]
    limit = 5.5 / math.sqrt(2048)
    across = torch.corrcoef(x) - torch.eye(64)
    assert across.abs().max() < limit
    for shift in (1, 2, 7):  # nor is a position another one's noise, moved by some channels
        moved = torch.corrcoef(torch.cat((x, x.roll(shift, dims=1))))[:64, 64:]
        assert moved.abs().max() < limit
    other = noise(tokens=64, dim=2048, seed=1)[0]
    assert torch.corrcoef(torch.cat((x, other)))[:64, 64:].abs().max() < limit
    channels = torch.corrcoef(noise(tokens=2048, dim=64)[0].T) - torch.eye(64)
    assert channels.abs().max() < limit


def test_the_generator_gives_the_seed_and_none_is_seed_zero():
    e, positions = torch.zeros(1, 4, 8), torch.arange(4)[None]
    generator = seeded()
    first = initial_state(NormalInitConfig(), e, positions, generator)
    second = initial_state(NormalInitConfig(), e, positions, generator)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    without = initial_state(NormalInitConfig(), e, positions, None)
    torch.manual_seed(2)
    assert torch.equal(without, initial_state(NormalInitConfig(), e, positions, None))


def test_zeros_and_copy():
    assert set(STATE_INITS) == set(typing.get_args(StateInitConfig))
    e = torch.randn(2, 3, 4)
    positions = torch.arange(3).expand(2, -1)
    assert not initial_state(ZerosInitConfig(), e, positions, None).any()
    assert torch.equal(initial_state(CopyInitConfig(), e, positions, None), e)


# --- the weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [{}, {"attention": MLA}])
def test_matrices_are_scaled_and_outputs_zero(attention):
    config = small_config(
        d_model=128,
        vocab_size=512,
        feed_forward=SwiGLUConfig(d_ff=256),
        core_feed_forward=MOE,
        **attention,
    )
    model = RecurrentDepthLM(config, seeded())
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
    model = RecurrentDepthLM(config, seeded())
    assert not model.halting.proj.weight.any()
    assert float(model.halting.proj.bias.detach()) == -1.5
    assert (model.injection.gate.bias == -2).all()


def test_where_a_norm_ends_the_branch_its_weight_is_zero():
    model = RecurrentDepthLM(small_config(block=BlockConfig(norm="peri"), core_feed_forward=MOE))
    for block in (*model.prelude, *model.core, *model.coda):
        assert not block.attention_out_norm.weight.any()
        assert not block.feed_forward_out_norm.weight.any()
        assert block.attention.out.weight.any()
