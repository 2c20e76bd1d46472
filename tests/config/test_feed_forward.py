import pytest

from openmythos.config import MoEConfig, ReLUSquaredConfig, SwiGLUConfig
from openmythos.config.weights import Weights, matrix
from tests.strategies import unchecked

MOE = {"num_experts": 4, "num_experts_per_token": 2, "d_expert": 8}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (SwiGLUConfig, {"d_ff": 0}, "d_ff is 0; it must be at least 1"),
        (ReLUSquaredConfig, {"d_ff": 0}, "d_ff is 0; it must be at least 1"),
        (
            MoEConfig,
            {**MOE, "num_experts_per_token": 5},
            "num_experts_per_token is 5; it must be at most",
        ),
        (MoEConfig, {**MOE, "num_shared_experts": -1}, "num_shared_experts is -1; it must be >= 0"),
        (MoEConfig, {**MOE, "bias_loops": 0}, "bias_loops is 0; it must be at least 1"),
        (
            MoEConfig,
            {**MOE, "scoring": "tanh"},
            "scoring is 'tanh'; it must be one of 'sigmoid', 'softmax'",
        ),
    ],
)
def test_bad_fields_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_width_of_a_shared_expert():
    assert MoEConfig(**MOE).shared_width == 8
    assert MoEConfig(**MOE, d_shared=3).shared_width == 3


@pytest.mark.parametrize(
    "part", [SwiGLUConfig(d_ff=6), ReLUSquaredConfig(d_ff=6, scale=0.5), MoEConfig(**MOE)]
)
def test_the_inner_width_can_be_another(part):
    wider = part.with_width(part.width + 1)
    assert (type(wider), wider.width) == (type(part), part.width + 1)
    assert wider.with_width(part.width) == part


def test_one_balancing_bias_without_a_loop():
    assert MoEConfig(**MOE, bias_loops=3).unlooped() == MoEConfig(**MOE)
    assert SwiGLUConfig(d_ff=6).unlooped() == SwiGLUConfig(d_ff=6)


def test_a_token_reads_the_experts_that_it_is_routed_to():
    parts = MoEConfig(**MOE, num_shared_experts=2, d_shared=3).weights(16, None)
    assert parts["router"] == matrix(16, 4)
    assert parts["routed_experts"] == Weights(4 * 3 * 16 * 8, 2 * 3 * 16 * 8, 2 * 3 * 16 * 8)
    assert parts["shared_experts"] == matrix(16, 3 * 2 * 3)
