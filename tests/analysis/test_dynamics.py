import json

import pytest

from openmythos.analysis.dynamics import measure_dynamics
from openmythos.analysis.example import text_examples
from openmythos.analysis.lens import CHOICE, measure_lenses
from openmythos.analysis.trace import trace_loops
from tests.analysis.family import OURS, model_of
from tests.strategies import random_tokens, unchecked


@pytest.mark.parametrize("kind", [*OURS, "ifm-moe"])
def test_every_kind_in_batches_of_any_size(kind: str) -> None:
    model = model_of(kind)
    tokens = random_tokens(model.config, 4, 6)
    examples = text_examples(tokens.tolist(), "random tokens")
    with unchecked():
        found = measure_dynamics(model, examples, 3, 1 << 30)
        halves = [measure_dynamics(model, half, 3, 1 << 30) for half in examples.batches(2)]
    trace = trace_loops(model, examples.tokens, 3, examples.context(model))
    assert found.trace.state_norm == pytest.approx(trace.state_norm)
    assert found.trace.num_tokens == 20
    assert len(found.blocks.places) == 1 + model.config.num_core_layers
    assert [layer.layer for layer in found.experts] == [
        layer for layer, block in enumerate(model.core) if hasattr(block.feed_forward, "router")
    ]
    for name in ("turn", "radial_fraction", "acceleration", "relative_step"):
        mean = sum(getattr(half.trace, name)[-1] for half in halves) / 2
        assert getattr(found.trace, name)[-1] == pytest.approx(mean, rel=1e-3, abs=1e-4)
    json.dumps(found.to_dict(), allow_nan=False)
    for lens in measure_lenses(model, examples, 3, 1 << 30):
        assert all(1 <= rank <= model.config.vocab_size for row in lens.rank[0] for rank in row)
        if lens.lens == "coda" and model.halting is None:
            chosen = lens.targets.index(CHOICE)
            assert lens.rank[chosen][-1][-1] == lens.first[chosen][-1][-1] == 1.0
