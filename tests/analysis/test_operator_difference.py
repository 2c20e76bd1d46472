import json
from typing import Any

import pytest

from openmythos.analysis.operator_difference import operator_difference
from openmythos.config import (
    LearnedLoopConfig,
    LoopScaleConfig,
    NormalInitConfig,
    OutputLoRAConfig,
    SinusoidalLoopConfig,
    WeightLoRAConfig,
)
from tests.analysis.planted import HOPS, IndexedRelay, Relay, planted_pairs
from tests.strategies import MOE, random_model, random_tokens, small_config

TOKENS = planted_pairs(20).tokens


def test_a_counter_in_the_state_is_no_loop_signal_and_a_loop_index_is() -> None:
    plain = operator_difference(Relay(), TOKENS, HOPS)
    assert set(sum(plain.relative, ())) == {0.0}
    indexed = operator_difference(IndexedRelay(), TOKENS, HOPS)
    assert min(indexed.neighbours) > 0.05
    assert all(indexed.relative[loop][loop] == 0.0 for loop in range(HOPS))
    assert json.loads(json.dumps(indexed.to_dict()))["neighbours"] == list(indexed.neighbours)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, False),
        ({"core_feed_forward": MOE, "state_init": NormalInitConfig(std=0.7)}, False),
        ({"loop_embedding": SinusoidalLoopConfig(num_channels=8)}, True),
        ({"loop_embedding": LearnedLoopConfig(num_loops=3)}, True),
        ({"loop_adapter": WeightLoRAConfig(rank=2, num_loops=3)}, True),
        ({"loop_adapter": OutputLoRAConfig(rank=2, num_loops=3)}, True),
        ({"loop_adapter": LoopScaleConfig(num_loops=3)}, True),
    ],
)
def test_only_loop_signals_make_a_difference(changes: dict[str, Any], differs: bool) -> None:
    model = random_model(small_config(**changes))
    found = operator_difference(model, random_tokens(model.config, 5, 6), 3, batch_size=2)
    assert all((value > 1e-3) == differs for value in found.neighbours)
    assert differs or set(sum(found.relative, ())) == {0.0}


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_loops is 0"):
        operator_difference(Relay(), TOKENS, 0)
