import pytest
import torch
from torch.nn import functional

from openmythos.ops import int8
from openmythos.ops.moe import gathered_experts
from tests.strategies import seeded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(21, 7), (3, 40, 33)])
def test_a_weight_is_off_by_half_a_scale(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    spread = torch.logspace(-6, 3, shape[-2], dtype=torch.float64)[:, None]
    weight = (torch.randn(shape, generator=seeded(1), dtype=torch.float64) * spread).to(dtype)
    values, scale = int8.quantise(weight)
    assert values.dtype == torch.int8
    assert torch.equal(scale, weight.float().abs().amax(dim=-1) / 127)
    off = (values.double() * scale.double()[..., None] - weight.double()).abs()
    assert bool((off <= scale.double()[..., None] * 0.50001).all())
    assert bool((values.int().abs().amax(dim=-1) == 127).all())


def test_channels_of_zeros_and_tiny_weights_stay_finite() -> None:
    weight = torch.stack([torch.zeros(5), torch.full((5,), 1e-45), torch.full((5,), 3e38)])
    values, scale = int8.quantise(weight)
    found = int8.dequantise(values, scale)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-40)


def test_weights_past_fp32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"too large for torch\.float32"):
        int8.quantise(torch.tensor([[1e300]], dtype=torch.float64))


def test_parts_are_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4, 11, 6, generator=seeded(2))
    whole, scale = int8.quantise(weight)
    x = torch.randn(4, 5, 6, generator=seeded(3))
    products = [int8.linear(x, whole[0], scale[0]), int8.heads(x, whole, scale, 2, 7)]
    monkeypatch.setattr(int8, "WIDENED", 13)
    assert torch.equal(int8.quantise(weight)[0], whole)
    torch.testing.assert_close(int8.linear(x, whole[0], scale[0]), products[0])
    torch.testing.assert_close(int8.heads(x, whole, scale, 2, 7), products[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_equal_those_of_the_widened_weights(dtype: torch.dtype) -> None:
    values, scale = int8.quantise(torch.randn(3, 12, 8, generator=seeded(4)))
    wide = int8.dequantise(values, scale.to(dtype))
    x = torch.randn(3, 5, 8, generator=seeded(5), dtype=dtype)
    torch.testing.assert_close(int8.linear(x, values[0], scale[0]), functional.linear(x, wide[0]))
    torch.testing.assert_close(int8.heads(x, values, scale, 3, 4), x @ wide[:, 3:7].mT)
    y = torch.randn(3, 5, 4, generator=seeded(6), dtype=dtype)
    torch.testing.assert_close(int8.absorb(y, values, scale, 3), y @ wide[:, 3:7])


def test_gathered_experts_equal_those_of_the_widened_weights() -> None:
    gate_up = int8.quantise(torch.randn(6, 10, 8, generator=seeded(7)))
    down = int8.quantise(torch.randn(6, 8, 5, generator=seeded(8)))
    expert = torch.tensor([[0, 3], [5, 3], [1, 2]])
    weight = torch.rand(3, 2, generator=seeded(9))
    x = torch.randn(3, 8, generator=seeded(10))
    found = int8.gathered_experts(x, expert, weight, *gate_up, *down)
    wide = int8.dequantise(*gate_up), int8.dequantise(*down)
    torch.testing.assert_close(found, gathered_experts(x, expert, weight, *wide))
