import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openmythos.analysis.pairs import Pairs, text_pairs
from openmythos.analysis.reading import ReadingMap, put_tokens, reading_map
from openmythos.config import (
    ACTConfig,
    AddInjectionConfig,
    DepthAttentionConfig,
    NormalInitConfig,
    SinusoidalLoopConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
)
from openmythos.interop.loading import load_pretrained
from openmythos.model.loop import advance, start_loops
from openmythos.model.recurrent import RecurrentDepthLM
from tests.analysis.planted import (
    HOPS,
    LOGIT,
    Average,
    IndexedRelay,
    OneShot,
    Relay,
    planted_pairs,
)
from tests.strategies import random_model, random_tokens, small_config

PAIRS = planted_pairs()


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        (Relay, torch.eye(HOPS)),
        (IndexedRelay, torch.eye(HOPS)),
        (Average, torch.full((HOPS, HOPS), 1 / HOPS)),
        (OneShot, torch.eye(HOPS)[:1].T.expand(HOPS, HOPS)),
    ],
)
def test_planted_models_read_what_they_were_made_to_read(
    planted: Any, expected: torch.Tensor
) -> None:
    found = reading_map(planted(), PAIRS, HOPS)
    torch.testing.assert_close(found.necessity, expected.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sufficiency, expected.double(), atol=1e-6, rtol=0)
    assert found.accuracy == 1.0
    assert found.num_loops == HOPS
    assert set(found.always[found.counted].tolist()) == {2 * LOGIT}


SEAMS: list[dict[str, Any]] = [
    {},
    {"halting": ACTConfig(bias_init=-1.0)},
    {"depth_attention": DepthAttentionConfig(num_recent_loops=2)},
    {"loop_adapter": WeightLoRAConfig(rank=2, num_loops=3)},
    {"value_embedding": ValueEmbeddingConfig(layers=(0,), gate_channels=8)},
    {"state_init": NormalInitConfig(std=0.7), "injection": AddInjectionConfig()},
]


def seam_pairs(config: Any, num_examples: int = 6) -> Pairs:
    corpus = random_tokens(config, 1, 60)[0]
    return text_pairs(corpus, length=4, num_examples=num_examples)


@pytest.mark.parametrize("changes", SEAMS)
def test_without_prelude_and_coda_all_loops_are_the_whole_effect(changes: dict[str, Any]) -> None:
    """The last token then sees the same in all loops as in a run on the corrupted text."""
    config = small_config(num_prelude_layers=0, num_coda_layers=0, **changes)
    found = reading_map(random_model(config, dtype=torch.float64), seam_pairs(config), 3)
    assert float(found.whole.abs().max()) > 1e-3
    torch.testing.assert_close(found.always, found.whole, atol=1e-12, rtol=1e-9)
    assert float((found.corrupted_at - found.always).abs().max()) > 1e-3


@pytest.mark.parametrize("changes", SEAMS)
def test_one_loop_is_all_loops_when_there_is_one(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    found = reading_map(random_model(config, dtype=torch.float64), seam_pairs(config), 1)
    assert torch.equal(found.corrupted_at[0], found.always)
    assert torch.equal(found.clean_at[0], torch.zeros_like(found.always))
    assert float((found.whole - found.always).abs().max()) > 1e-3, "the coda reads it as well"


@torch.no_grad()
def margins_by_hand(
    model: RecurrentDepthLM, pairs: Pairs, column: int, bad: Sequence[bool]
) -> torch.Tensor:
    """logit(answer) - logit(counterfactual answer), with the column corrupted at these loops."""
    seeds, rows = list(range(len(pairs))), torch.arange(len(pairs))
    changed = (pairs.corrupted[column] != pairs.tokens)[..., None]
    runs = []
    for tokens in (pairs.tokens, pairs.corrupted[column]):
        ctx = model.context(tokens, seeds=seeds)
        e = model.encode(tokens, ctx)
        states = [model.init_state(e, ctx)]
        for loop in range(len(bad)):
            states.append(model.step(states[-1], e, torch.full_like(rows, loop), ctx))
        runs.append((ctx, e, states))
    (ctx, e, clean), (other_ctx, other_e, other) = (
        runs  # a context has the value embeddings' tokens
    )
    h = clean[0]
    for loop, corrupt in enumerate(bad):
        seen = torch.where(changed, other[loop], h) if corrupt else h
        driven = torch.where(changed, other_e, e) if corrupt else e
        index = torch.full_like(rows, loop)
        after = model.step(seen, driven, index, other_ctx if corrupt else ctx)
        h = torch.where(changed, clean[loop + 1], after)
    logits = model.decode(h, ctx)[:, -1].double()
    return logits[rows, pairs.answers] - logits[rows, pairs.counterfactual_answers[column]]


@pytest.mark.parametrize("family", ["huginn", "ouro", "parcae", "ours"])
def test_losses_equal_a_computation_by_hand(family: str, golden_dir: Callable[[str], Path]) -> None:
    """Of families with a random initial state, an exit gate, preludes and codas."""
    ours = small_config(loop_embedding=SinusoidalLoopConfig(num_channels=8))
    model = random_model(ours) if family == "ours" else load_pretrained(golden_dir(family))
    pairs, loops = seam_pairs(model.config, 3), 2
    found = reading_map(model, pairs, loops)
    column, every = 1, [True] * loops
    clean = margins_by_hand(model, pairs, column, [False] * loops)
    expected = clean - margins_by_hand(model, pairs, column, every)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found.always[column], expected, atol=1e-4, rtol=1e-4)
    for loop in range(loops):
        alone = [index == loop for index in range(loops)]
        others = [not corrupt for corrupt in alone]
        for losses, bad in ((found.corrupted_at, alone), (found.clean_at, others)):
            expected = clean - margins_by_hand(model, pairs, column, bad)
            torch.testing.assert_close(losses[loop, column], expected, atol=1e-4, rtol=1e-4)


def test_batches_change_nothing_and_each_text_has_its_own_noise() -> None:
    config = small_config(state_init=NormalInitConfig(std=0.7))
    model = random_model(config, dtype=torch.float64)
    pairs = seam_pairs(config)
    whole, parts = (reading_map(model, pairs, 3, batch_size=size) for size in (6, 4))
    for name in ("corrupted_at", "clean_at", "always", "whole"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    assert torch.equal(whole.correct, parts.correct)
    first = {
        "tokens": pairs.tokens[:1].expand(6, -1),
        "answers": pairs.answers[:1].expand(6),
        "corrupted": pairs.corrupted[:, :1].expand(-1, 6, -1),
        "counterfactual_answers": pairs.counterfactual_answers[:, :1].expand(-1, 6),
    }
    repeated = replace(pairs, **first)
    assert len(set(reading_map(model, repeated, 2).always[0].tolist())) == 6


def test_all_that_belongs_to_a_token_is_put() -> None:
    config = small_config(halting=ACTConfig(bias_init=-1.0))
    config = replace(config, depth_attention=DepthAttentionConfig(num_recent_loops=2))
    model = random_model(config)
    tokens, other = random_tokens(config, 2, 5), random_tokens(config, 2, 5, seed=1)
    ctx, chosen = model.context(tokens), torch.zeros(2, 5, dtype=torch.bool)
    chosen[:, 3] = True
    with torch.no_grad():
        state, source = (
            advance(model, start_loops(model, model.encode(x, c), c, [3, 3]), c)
            for x, c in ((tokens, ctx), (other, model.context(other)))
        )
        put = put_tokens(state, chosen, source)
        back = put_tokens(put, chosen, state)
    assert torch.equal(put.h[:, 3], source.h[:, 3]) and torch.equal(put.h[:, :3], state.h[:, :3])
    assert torch.equal(put.e[:, 3], source.e[:, 3]) and torch.equal(put.e[:, 4], state.e[:, 4])
    assert torch.equal(put.halted.mixed[:, 3], source.halted.mixed[:, 3])
    assert torch.equal(put.halted.tracker.mass[:, 3], source.halted.tracker.mass[:, 3])
    for new, a, b in zip(put.recent[0], state.recent[0], source.recent[0], strict=True):
        assert torch.equal(new[..., 3, :], b[..., 3, :]) and torch.equal(
            new[..., 4, :], a[..., 4, :]
        )
    assert torch.equal(back.h, state.h) and torch.equal(back.e, state.e)
    assert put.loops == state.loops


def test_a_column_that_nobody_reads_is_undefined() -> None:
    loss = torch.zeros(2, 2, 40, dtype=torch.float64)
    loss[0, 0] = 1.0
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    always = torch.stack((torch.ones(40, dtype=torch.float64), noise - noise.mean()))
    counted = torch.ones(2, 40, dtype=torch.bool)
    found = ReadingMap(
        columns=("a", "b"),
        corrupted_at=loss,
        clean_at=loss.flip(0),
        always=always,
        whole=always,
        counted=counted,
        correct=torch.ones(40, dtype=torch.bool),
    )
    assert found.is_read.tolist() == [True, False]
    assert found.necessity[:, 0].tolist() == [1.0, 0.0]
    assert found.sufficiency[:, 0].tolist() == [1.0, 0.0]
    assert bool(found.necessity[:, 1].isnan().all())
    stored = json.loads(json.dumps(found.to_dict(num_samples=20), allow_nan=False))
    assert stored["necessity"] == [[1.0, None], [0.0, None]]
    assert stored["necessity_interval"] == [[[1.0, 1.0], None], [[0.0, 0.0], None]]
    assert stored["necessity_sum"] == [1.0, None]


def test_shares_are_ratios_of_means() -> None:
    lost = torch.tensor([[[1.0, 3.0, 100.0]]], dtype=torch.float64)
    found = ReadingMap(
        columns=("a",),
        corrupted_at=lost,
        clean_at=lost,
        always=torch.tensor([[4.0, 4.0, 100.0]], dtype=torch.float64),
        whole=torch.ones(1, 3, dtype=torch.float64),
        counted=torch.tensor([[True, True, False]]),
        correct=torch.tensor([True, False, False]),
    )
    assert found.necessity.tolist() == [[0.5]]
    assert found.sufficiency.tolist() == [[0.5]]
    assert found.share(lost, torch.tensor([[2.0, 1.0, 7.0]], dtype=torch.float64)).tolist() == [
        [[5 / 12]]
    ]


def test_model_keeps_its_mode_and_bad_input_is_named() -> None:
    model = random_model(small_config())
    model.train()
    reading_map(model, seam_pairs(model.config, 2), 1)
    assert model.training
    with pytest.raises(ValueError, match="num_loops is 0"):
        reading_map(model, seam_pairs(model.config, 2), 0)
