from typing import Any

import pytest
import torch

from openmythos.analysis.pairs import text_pairs
from openmythos.analysis.reading import reading_map
from openmythos.analysis.stack import LayersAsLoops
from openmythos.config import (
    ACTConfig,
    DepthAttentionConfig,
    GateInjectionConfig,
    LearnedLoopConfig,
    NormalInitConfig,
    OriginalLTIInjectionConfig,
    OutputLoRAConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
)
from tests.strategies import MOE, random_model, random_tokens, small_config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"injection": GateInjectionConfig(), "state_init": NormalInitConfig(std=0.7)},
        {"injection": OriginalLTIInjectionConfig(), "loop_norm": True},
        {"halting": ACTConfig(bias_init=-1.0), "core_feed_forward": MOE},
        {"loop_adapter": OutputLoRAConfig(rank=2, num_loops=3)},
        {
            "loop_adapter": WeightLoRAConfig(rank=2, num_loops=3),
            "loop_embedding": LearnedLoopConfig(num_loops=3),
            "value_embedding": ValueEmbeddingConfig(layers=(2,), gate_channels=8),
        },
    ],
)
def test_all_groups_are_one_loop_of_the_model(changes: dict[str, Any]) -> None:
    config = small_config(num_core_layers=4, num_loops=1, **changes)
    model = random_model(config)
    tokens = random_tokens(config, 3, 6)
    with torch.no_grad():
        expected = model(tokens).logits
        for num_loops in (1, 2, 4):
            assert torch.equal(LayersAsLoops(model, num_loops)(tokens).logits, expected)


def test_rows_may_be_at_different_groups() -> None:
    config = small_config(num_core_layers=6)
    view = LayersAsLoops(random_model(config), 3)
    tokens = random_tokens(config, 3, 6)
    with torch.no_grad():
        together = view(tokens, num_loops=[3, 1, 2]).logits
        for row, depth in enumerate((3, 1, 2)):
            alone = view(tokens[row : row + 1], num_loops=depth).logits[0]
            torch.testing.assert_close(together[row], alone)


def test_a_map_of_a_stack_needs_nothing_else() -> None:
    """Without a prelude, two groups that read are told apart by which of them is corrupted."""
    config = small_config(num_core_layers=4, num_prelude_layers=0, num_coda_layers=0)
    model = random_model(config, dtype=torch.float64)
    pairs = text_pairs(random_tokens(config, 1, 60)[0], length=4, num_examples=6)
    found = reading_map(LayersAsLoops(model, 2), pairs, 2)
    whole = reading_map(model, pairs, 1)
    torch.testing.assert_close(found.always, found.whole)
    torch.testing.assert_close(found.always, whole.always)
    assert not torch.allclose(found.corrupted_at[0], found.corrupted_at[1])
    apart = (found.corrupted_at - found.always).abs()[:, found.counted]
    assert float(apart.min()) > 0


def test_the_view_shares_the_weights() -> None:
    model = random_model(small_config(num_core_layers=4, halting=ACTConfig(bias_init=-1.0)))
    view = LayersAsLoops(model, 2)
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in view.parameters()} <= own
    assert model.halting is not None and view.halting is None
    assert view.config.num_loops == 2 and model.config.num_loops == 4


def test_bad_input_is_named() -> None:
    config = small_config(num_core_layers=4)
    model = random_model(config)
    with pytest.raises(ValueError, match="num_loops is 3; it must divide"):
        LayersAsLoops(model, 3)
    with pytest.raises(ValueError, match="loop 3 of a stack of 2 groups"):
        LayersAsLoops(model, 2)(random_tokens(config, 1, 4), num_loops=3)
    deep = small_config(depth_attention=DepthAttentionConfig(num_recent_loops=1))
    with pytest.raises(ValueError, match="depth_attention, which reads earlier loops"):
        LayersAsLoops(random_model(deep), 2)
