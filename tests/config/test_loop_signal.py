import pytest

from openmythos.config import (
    LearnedLoopConfig,
    OutputLoRAConfig,
    SinusoidalLoopConfig,
    WeightLoRAConfig,
)
from openmythos.config.loop_signal import loop_linear
from openmythos.config.weights import Weights, matrix, table
from tests.strategies import unchecked


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (LearnedLoopConfig, {"num_loops": 0}, "num_loops is 0; it must be at least 1"),
        (WeightLoRAConfig, {"rank": 0, "num_loops": 1}, "rank is 0; it must be at least 1"),
        (OutputLoRAConfig, {"rank": 1, "num_loops": 0}, "num_loops is 0; it must be at least 1"),
    ],
)
def test_bad_fields_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_weights_of_a_loop():
    lora = WeightLoRAConfig(rank=2, num_loops=3)
    assert loop_linear(5, 7, None) == matrix(5, 7)
    assert loop_linear(5, 7, lora) == matrix(5, 7) + Weights(3 * 2 * 12, 2 * 12, 2 * 12)
    assert lora.core_lora is lora
    assert lora.weights(16) == Weights()  # they stand in the core's layers
    output = OutputLoRAConfig(rank=2, num_loops=3)
    assert output.core_lora is None
    assert output.weights(16) == matrix(16, 2) + matrix(2, 16) + table(3, 2)
    assert LearnedLoopConfig(num_loops=3).weights(16) == table(3, 16)
    assert SinusoidalLoopConfig(num_channels=4).weights(16) == Weights()
