import pytest

from openmythos.config import MoEConfig, ReLUSquaredConfig, SwiGLUConfig
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
