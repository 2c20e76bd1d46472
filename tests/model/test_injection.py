import typing

import pytest
import torch
from torch.nn import functional

from openmythos.config import (
    AddInjectionConfig,
    GateInjectionConfig,
    InjectionConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    NoInjectionConfig,
    OriginalLTIInjectionConfig,
)
from openmythos.model.injection import (
    INJECTIONS,
    LTIInjection,
    OriginalLTIInjection,
    make_injection,
    stable_decay,
)
from tests.strategies import randomise, small_config

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EXTREMES = [0.0, 1.0, -1.0, 5.0, -6.5, -17.5, 20.0, -20.0, 200.0, -200.0, 1e4, -1e4]


def made(config) -> torch.nn.Module:
    injection = make_injection(small_config(injection=config))
    randomise(injection)
    return injection.double()


def state(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor(EXTREMES, dtype=dtype)
    return values.repeat_interleave(len(values)), values.repeat(len(values))


def test_every_member_has_a_class():
    assert set(INJECTIONS) == set(typing.get_args(InjectionConfig))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rho_is_below_one_for_every_parameter(dtype):
    """The original reached exactly 1 from -17.5 in fp32 and -6.5 in bf16 (audit, defect 12)."""
    log_rate, second = pairs(dtype)
    decay = stable_decay(log_rate, dtype)
    assert ((decay >= 0) & (decay < 1)).all()

    size = len(log_rate)
    lti = LTIInjection(small_config(d_model=size), LTIInjectionConfig())
    original = OriginalLTIInjection(small_config(d_model=size), OriginalLTIInjectionConfig())
    with torch.no_grad():
        lti.a_log.copy_(log_rate), lti.dt_bias.copy_(second)
        original.log_a.copy_(log_rate), original.log_dt.copy_(second[:1])
    for injection in (lti.to(dtype), original.to(dtype)):
        decay = injection.decay()
        assert decay.dtype == dtype
        assert ((decay >= 0) & (decay < 1)).all()
        h = torch.ones(1, 1, size, dtype=dtype)
        moved = injection.mix(h, torch.zeros_like(h))
        assert moved.isfinite().all()
    assert (lti.mix(h, torch.zeros_like(h)) < 1).all()  # in the product as well


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_the_extremes(dtype):
    a_log, dt_bias = pairs(dtype)
    size = len(a_log)
    injection = LTIInjection(small_config(d_model=size), LTIInjectionConfig()).to(dtype)
    with torch.no_grad():
        injection.a_log.copy_(a_log)
        injection.dt_bias.copy_(dt_bias)
    h = torch.ones(1, 1, size, dtype=dtype)
    injection.mix(h, injection.drive(h)).sum().backward()
    for parameter in injection.parameters():
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parcaes_formula_in_the_ordinary_range(dtype):
    config = small_config(d_model=64)
    injection = LTIInjection(config, LTIInjectionConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        injection.a_log.copy_(torch.randn(64, generator=generator) * 2)
        injection.dt_bias.copy_(torch.randn(64, generator=generator) * 4)
        injection.weight.copy_(torch.randn(64, 64, generator=generator))
    injection = injection.to(dtype)
    h, e = torch.randn(2, 2, 3, 64, generator=generator, dtype=dtype)
    delta = functional.softplus(injection.dt_bias)
    decay = torch.exp(-delta * injection.a_log.exp())
    torch.testing.assert_close(injection.decay(), decay)
    expected = decay * h + delta * (e @ injection.weight.T)
    torch.testing.assert_close(injection.mix(h, injection.drive(e)), expected)
    torch.testing.assert_close(injection.update(h, e, h), h)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_orthogonal_removes_the_component_along_the_drive(dtype):
    """xllm-loop's OrthogonalInputInjection, whose formula this is, in fp64."""
    plain, projected = (made(LTIInjectionConfig(orthogonal=flag)) for flag in (False, True))
    h, drive = state(0), plain.drive(state(1))
    kept = plain.mix(h, drive) - drive
    along = (kept * drive).sum(-1, keepdim=True) / (drive.square().sum(-1, keepdim=True) + 1e-6)
    expected = kept - along * drive + drive
    assert (expected - plain.mix(h, drive)).abs().max() > 0.1
    assert ((projected.mix(h, drive) - drive) * drive).sum(-1).abs().max() < 1e-4
    found = projected.to(dtype).mix(h.to(dtype), drive.to(dtype))
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def test_a_linear_injection_may_have_a_bias():
    injection = made(LinearInjectionConfig(bias=True))
    h, e = state(0), state(1)
    both = torch.cat((injection.h_weight, injection.e_weight), dim=1)
    expected = torch.cat((h, e), dim=-1) @ both.T + injection.bias
    torch.testing.assert_close(injection.mix(h, injection.drive(e)), expected)
    assert injection.bias.abs().min() > 0
    assert made(LinearInjectionConfig()).bias is None
    fresh = make_injection(small_config(injection=LinearInjectionConfig(bias=True)))
    assert not fresh.bias.any()


@pytest.mark.parametrize("decay_init", [0.2**0.5, 0.05, 0.99])
def test_the_decay_starts_where_the_config_says(decay_init):
    injection = LTIInjection(small_config(), LTIInjectionConfig(decay_init=decay_init))
    torch.testing.assert_close(injection.decay(), torch.full((16,), decay_init))
    if decay_init == 0.2**0.5:  # Parcae's: softplus(dt_bias) = .8047, fixed point 1.456 e
        e = torch.ones(1, 1, 16)
        h = torch.zeros_like(e)
        assert float(functional.softplus(injection.dt_bias.detach()[0])) == pytest.approx(
            0.8047, abs=1e-4
        )
        for _ in range(60):
            h = injection.mix(h, injection.drive(e)).detach()
        torch.testing.assert_close(h, torch.full_like(h, 1.456), atol=1e-3, rtol=0)


def test_the_originals_formula():
    injection = made(OriginalLTIInjectionConfig())
    h, e, y = state(1), state(2), state(3)
    decay = torch.exp(-torch.exp((injection.log_a + injection.log_dt).clamp(-20, 20)))
    torch.testing.assert_close(injection.decay(), decay)
    torch.testing.assert_close(injection.drive(e), e)
    root = (h + e).square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(injection.mix(h, e), (h + e) / root * injection.norm.weight)
    torch.testing.assert_close(injection.update(h, e, y), decay * h + injection.weight * e + y)
    fresh = OriginalLTIInjection(small_config(), OriginalLTIInjectionConfig())
    assert fresh.decay()[0].item() == pytest.approx(0.3679, abs=1e-4)
    assert fresh.weight[0].item() == pytest.approx(0.1)


def test_linear_is_huginns_adapter_on_both():
    injection = made(LinearInjectionConfig())
    h, e = state(1), state(2)
    adapter = torch.cat((injection.h_weight, injection.e_weight), dim=1)
    expected = functional.linear(torch.cat((h, e), dim=-1), adapter)
    torch.testing.assert_close(injection.mix(h, injection.drive(e)), expected)
    fresh = make_injection(small_config(injection=LinearInjectionConfig())).double()
    torch.testing.assert_close(fresh.mix(h, fresh.drive(e)), h + e)


def test_gate_is_biased_towards_the_identity():
    injection = made(GateInjectionConfig())
    h, e, y = state(1), state(2), state(3)
    gate = torch.sigmoid(injection.gate(torch.cat((y, h), dim=-1)))
    torch.testing.assert_close(injection.mix(h, e), h + e)
    torch.testing.assert_close(injection.update(h, e, y), gate * y + (1 - gate) * h)
    with torch.no_grad():
        injection.gate.weight.zero_()
        injection.gate.bias.fill_(-2)
    torch.testing.assert_close(injection.update(h, e, y), h + (y - h) * 0.11920292202211755)


def test_chens_gate_leaves_e_out():
    injection = made(GateInjectionConfig(add_e=False))
    h, e, y = state(1), state(2), state(3)
    assert torch.equal(injection.mix(h, injection.drive(e)), h)
    gate = torch.sigmoid(injection.gate(torch.cat((y, h), dim=-1)))
    torch.testing.assert_close(injection.update(h, e, y), gate * y + (1 - gate) * h)


@pytest.mark.parametrize("config", [AddInjectionConfig(), NoInjectionConfig()])
def test_add_and_none(config):
    injection = make_injection(small_config(injection=config))
    h, e, y = state(1), state(2), state(3)
    expected = h + e if isinstance(config, AddInjectionConfig) else h
    torch.testing.assert_close(injection.mix(h, injection.drive(e)), expected)
    torch.testing.assert_close(injection.update(h, e, y), y)
    assert injection.decay() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        LTIInjectionConfig(),
        OriginalLTIInjectionConfig(),
        LinearInjectionConfig(),
        AddInjectionConfig(),
        NoInjectionConfig(),
        GateInjectionConfig(),
    ],
)
def test_the_states_dtype_is_kept(config, dtype):
    injection = make_injection(small_config(injection=config)).to(dtype)
    h, e, y = (state(i).to(dtype) for i in range(3))
    driven = injection.drive(e)
    assert (
        driven.dtype
        == injection.mix(h, driven).dtype
        == injection.update(h, driven, y).dtype
        == dtype
    )
    injection = make_injection(small_config(injection=config))
    h, e, y = h.float(), e.float(), y.float()
    with torch.autocast("cpu", dtype):
        driven = injection.drive(e)
        assert injection.mix(h, driven).dtype == torch.float32
        assert injection.update(h, driven, y).dtype == torch.float32
