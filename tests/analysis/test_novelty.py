import json
import math

import pytest
import torch

from openmythos.analysis.novelty import MIN_HARM, Novelty, _ridge, novelty
from openmythos.config import ACTConfig, DepthAttentionConfig
from tests.analysis.planted import HOPS, Average, OneShot, Planted, Relay, planted_pairs
from tests.strategies import random_model, random_tokens, seeded, small_config, unchecked

PAIRS, FIT = planted_pairs(60), planted_pairs(200, seed=9).tokens


def measured(planted: type[Planted]) -> Novelty:
    return novelty(planted(), PAIRS.tokens, PAIRS.answers, HOPS, fit=FIT, num_samples=200)


def test_an_average_has_no_novelty_and_a_relay_has() -> None:
    average, relay = measured(Average), measured(Relay)
    for found, upper in ((average.scalar_novelty, 1e-6), (average.ridge_novelty, 0.05)):
        assert all(abs(value) < upper for value in found)
    assert all(high < 0.05 for _, high in average.ridge_interval)
    assert all(average.log_prob - value > MIN_HARM for value in average.floor)
    assert max(relay.scalar) < math.log(1 / 16), "no better than a guess"
    for (_, high), (low, _) in zip(average.ridge_interval, relay.ridge_interval, strict=True):
        assert high < low


def test_after_one_shot_nothing_is_asked() -> None:
    found = measured(OneShot)
    assert set(found.scalar_novelty) == {None} == set(found.ridge_novelty)
    assert set(found.ridge_interval) == {None}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["log_prob"] == found.log_prob


def test_novelty_by_hand() -> None:
    """The average's last loop, replaced: all shares but one are right, one is another text's."""
    found = measured(Average)
    logits = torch.zeros(60, 20)
    rows = torch.arange(60)
    answers = torch.tensor([int(walk) for walk in PAIRS.answers])
    others = planted_pairs(200, seed=9).answers[:60]
    logits[rows, answers] += 4 * (HOPS - 1) / HOPS
    logits[rows, others] += 4 / HOPS
    expected = logits.log_softmax(-1)[rows, answers].mean()
    assert found.floor[-1] == pytest.approx(float(expected), abs=1e-5)
    kept = (found.ridge[-1] - found.floor[-1]) / (found.log_prob - found.floor[-1])
    assert found.ridge_novelty[-1] == pytest.approx(1 - kept)


@pytest.mark.parametrize("num_rows", [6, 40])
def test_ridge_is_the_same_with_few_and_with_many_texts(num_rows: int) -> None:
    draw = seeded()
    x, y = (torch.randn(num_rows, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    penalty = 0.01 * x.square().sum(dim=0).mean()
    system = x.T @ x + penalty * torch.eye(12)
    torch.testing.assert_close(system @ _ridge(x, y), x.T @ y)
    assert torch.equal(
        _ridge(torch.zeros(6, 12, dtype=torch.float64), y[:6]), torch.zeros(12, 12).double()
    )


def test_batches_change_nothing() -> None:
    config = small_config(
        halting=ACTConfig(bias_init=-1.0),
        depth_attention=DepthAttentionConfig(num_recent_loops=2),
    )
    model = random_model(config, dtype=torch.float64)
    tokens, fit = random_tokens(config, 5, 6), random_tokens(config, 7, 6, seed=1)
    answers = random_tokens(config, 5)
    whole, parts = (
        novelty(model, tokens, answers, 3, fit=fit, batch_size=size, num_samples=10)
        for size in (8, 2)
    )
    assert whole.floor == pytest.approx(parts.floor)
    assert whole.ridge == pytest.approx(parts.ridge)
    assert whole.scalar == pytest.approx(parts.scalar)
    assert len(whole.floor) == 2
    assert whole.log_prob != pytest.approx(whole.floor[0])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_loops is 1"):
        novelty(Relay(), PAIRS.tokens, PAIRS.answers, 1, fit=FIT)
    with unchecked(), pytest.raises(ValueError, match="the texts to fit have 4 tokens"):
        novelty(Relay(), PAIRS.tokens, PAIRS.answers, 2, fit=FIT[:, 1:])
