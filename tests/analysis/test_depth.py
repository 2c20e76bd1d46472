import json
from dataclasses import replace

import pytest
import torch

from openmythos.analysis.depth import DepthCurve, measure_depth
from openmythos.analysis.example import text_examples
from openmythos.model.inference import inference
from tests.analysis.family import OURS, model_of
from tests.strategies import random_tokens

CURVE = DepthCurve(
    trained=4,
    of_text=False,
    num_positions=100,
    accuracy=(0.2, 0.975, 0.981, 0.99, 0.985),
    log_prob=(-3.0, -2.02, -2.005, -2.0, -2.1),
)


@pytest.mark.parametrize("kind", OURS)
def test_every_depth_is_that_of_a_forward(kind: str) -> None:
    model = model_of(kind)
    examples = text_examples([*random_tokens(model.config, 3, 7).tolist(), [1, 2]], "random")
    curve = measure_depth(model, examples, 3, 1 << 30)
    assert measure_depth(model, examples, 3, 200_000).accuracy == pytest.approx(curve.accuracy)
    asked, answers = examples.asked, examples.answers[examples.asked]
    for loops in (1, 2, 3):
        ctx = examples.context(model)
        with inference(model):
            logits = model(examples.tokens, num_loops=loops, ctx=ctx).logits[asked]
        right = (logits.argmax(-1) == answers).float().mean().item()
        assert curve.accuracy[loops - 1] == pytest.approx(right)
        nats = -torch.nn.functional.cross_entropy(logits, answers).item()
        assert curve.log_prob[loops - 1] == pytest.approx(nats, abs=1e-5)
    assert curve.num_positions == 19 and curve.of_text


def test_the_fewest_loops_are_within_one_point_of_the_best() -> None:
    assert CURVE.fewest == 3
    assert replace(CURVE, of_text=True).fewest == 2  # 2.02 nats are one per cent above 2
    assert json.loads(json.dumps(CURVE.to_dict()))["fewest"] == 3
