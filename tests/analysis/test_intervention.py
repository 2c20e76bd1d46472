import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openmythos.analysis.intervention import (
    answer_log_prob,
    answer_logits,
    intervene,
    repeat,
    skip,
    swap,
)
from openmythos.config import (
    ACTConfig,
    DepthAttentionConfig,
    LearnedLoopConfig,
    NormalInitConfig,
)
from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM
from tests.analysis.planted import HOPS, IndexedRelay, OneShot, Relay, planted_pairs
from tests.strategies import random_model, random_tokens, small_config

LOOPS = 3


def test_schedules() -> None:
    assert [skip(3, loop) for loop in range(3)] == [(1, 2), (0, 2), (0, 1)]
    assert [repeat(3, loop) for loop in range(3)] == [(0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 2, 2)]
    assert swap(3, 0, 2) == (2, 1, 0)


@pytest.fixture(params=["huginn", "ouro", "parcae", "ours", "act"])
def tied(request: pytest.FixtureRequest, golden_dir: Callable[[str], Path]) -> RecurrentDepthLM:
    """A model whose loops no signal tells apart."""
    if request.param == "ours":
        return random_model(small_config(state_init=NormalInitConfig(std=0.7)))
    if request.param == "act":
        return random_model(small_config(halting=ACTConfig(bias_init=-2.0)))
    return load_pretrained(golden_dir(request.param))


def test_tied_loops_say_only_the_depth_curve(tied: RecurrentDepthLM) -> None:
    tokens = random_tokens(tied.config, 3, 6)

    def curve(num_loops: int) -> torch.Tensor:
        with torch.no_grad():
            ctx = tied.context(tokens, seeds=[0, 1, 2])
            return tied(tokens, num_loops=num_loops, ctx=ctx).logits[:, -1]

    assert not torch.equal(curve(LOOPS), curve(LOOPS - 1)), "the check would say nothing"
    for loop in range(LOOPS):
        assert torch.equal(answer_logits(tied, tokens, skip(LOOPS, loop)), curve(LOOPS - 1))
        assert torch.equal(answer_logits(tied, tokens, repeat(LOOPS, loop)), curve(LOOPS + 1))
        assert torch.equal(answer_logits(tied, tokens, swap(LOOPS, loop, 0)), curve(LOOPS))
    answers = random_tokens(tied.config, 3)
    found = intervene(tied, tokens, answers, LOOPS)
    assert found.unchanged == float(answer_log_prob(curve(LOOPS), answers).mean())
    assert {value - found.unchanged for value in found.swapped} == {0.0}
    assert set(found.skipped) == {float(answer_log_prob(curve(LOOPS - 1), answers).mean())}
    assert set(found.repeated) == {float(answer_log_prob(curve(LOOPS + 1), answers).mean())}


def test_a_loop_index_makes_the_order_matter() -> None:
    pairs = planted_pairs(20)
    found = intervene(IndexedRelay(), pairs.tokens, pairs.answers, HOPS)
    assert max(found.swapped) < found.unchanged - 1
    assert max(found.skipped) < found.unchanged - 1
    tied = intervene(Relay(), pairs.tokens, pairs.answers, HOPS)
    assert set(tied.swapped) == {tied.unchanged} == set(tied.repeated)
    assert len(set(tied.skipped)) == 1
    once = intervene(OneShot(), pairs.tokens, pairs.answers, HOPS)
    assert set(once.skipped) == {once.unchanged}
    assert json.loads(json.dumps(once.to_dict()))["unchanged"] == once.unchanged


def test_loops_with_signals_and_depth_attention_run_in_any_order() -> None:
    config = small_config(
        loop_embedding=LearnedLoopConfig(num_loops=4),
        depth_attention=DepthAttentionConfig(num_recent_loops=2),
    )
    model = random_model(config)
    tokens = random_tokens(config, 5, 6)
    alone = answer_logits(model, tokens, (2, 0, 2), batch_size=2)
    torch.testing.assert_close(alone, answer_logits(model, tokens, (2, 0, 2)))
    assert not torch.allclose(alone, answer_logits(model, tokens, (0, 2, 2)))


def test_bad_input_is_named() -> None:
    pairs = planted_pairs(2)
    with pytest.raises(ValueError, match="num_loops is 1"):
        intervene(Relay(), pairs.tokens, pairs.answers, 1)
    with pytest.raises(ValueError, match="the schedule has no loop"):
        answer_logits(Relay(), pairs.tokens, ())
    with pytest.raises(ValueError, match="batch_size is 0"):
        answer_logits(Relay(), pairs.tokens, (0,), batch_size=0)
