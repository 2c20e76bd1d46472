import itertools
import json

import pytest
import torch

from openmythos.analysis.trace import LoopTrace, Mean, TraceSums, token_correlation, trace_loops
from openmythos.config import AddInjectionConfig
from tests.analysis.family import planted_loops
from tests.strategies import random_model, random_tokens, small_config


@torch.no_grad()
def traced(num_loops: int = 5) -> tuple[LoopTrace, list[torch.Tensor], float]:
    model = random_model(small_config())
    tokens = random_tokens(model.config, 2, 6)
    ctx = model.context(tokens)
    e = model.encode(tokens, ctx)
    states = [model.init_state(e, ctx)]
    for loop in range(num_loops):
        states.append(model.step(states[-1], e, torch.tensor([loop, loop]), ctx))
    return trace_loops(model, tokens, num_loops), states, float(model.injection.decay().max())


def test_trace_equals_hand_computation() -> None:
    trace, states, rho = traced(num_loops=5)
    norms = [h.norm(dim=-1).mean().item() for h in states]
    steps = [(b - a).norm(dim=-1) for a, b in itertools.pairwise(states)]
    relative = [
        (step / h.norm(dim=-1)).mean().item() for step, h in zip(steps, states[1:], strict=True)
    ]
    moved = [step.mean().item() for step in steps]
    assert trace.num_loops == 5
    assert trace.num_tokens == 12
    assert trace.initial_norm == pytest.approx(norms[0])
    assert trace.state_norm == pytest.approx(norms[1:])
    assert trace.step_norm == pytest.approx(moved)
    assert trace.relative_step == pytest.approx(relative)
    assert trace.step_ratio[0] is None
    expected = [b / a for a, b in itertools.pairwise(moved)]
    assert trace.step_ratio[1:] == pytest.approx(expected)
    assert trace.rho == rho
    updates = [b - a for a, b in itertools.pairwise(states)]
    for loop, (h, update) in enumerate(zip(states[1:], updates, strict=True)):
        along = (update * h).sum(-1) / h.norm(dim=-1)
        radial = (along**2 / update.norm(dim=-1) ** 2).mean().item()
        assert trace.radial_fraction[loop] == pytest.approx(radial, rel=1e-4)
    assert trace.turn[0] is None and trace.acceleration[0] is None
    for loop, (last, update) in enumerate(itertools.pairwise(updates), start=1):
        turn = torch.cosine_similarity(last, update, dim=-1).mean().item()
        assert trace.turn[loop] == pytest.approx(turn, abs=1e-6)
        bent = (update - last).norm(dim=-1).mean().item()
        assert trace.acceleration[loop] == pytest.approx(bent)


def test_angles_of_planted_states() -> None:
    # Along the first axis from 3 to 5, a right angle to (5, 2), and no step at all.
    points = torch.tensor([[3.0, 0.0], [5.0, 0.0], [5.0, 2.0], [5.0, 2.0]])
    sums = TraceSums()
    for loop in planted_loops(points[:, None, None]):
        sums.add(loop, torch.ones(1, 1, dtype=torch.bool))
    trace = sums.trace(random_model(small_config()))
    assert trace.turn == (None, pytest.approx(0.0), None)
    assert trace.radial_fraction == (pytest.approx(1.0), pytest.approx(4 / 29), None)
    assert trace.acceleration == (None, pytest.approx(8**0.5), pytest.approx(2.0))
    assert trace.relative_step == pytest.approx((2 / 5, 2 / 29**0.5, 0.0))
    assert trace.step_ratio == (None, pytest.approx(1.0), 0.0)


def test_means_leave_out_what_is_not_defined() -> None:
    mean = Mean(2)
    mean.add([torch.tensor([1.0, float("nan"), 3.0]), torch.full((3,), float("nan"))])
    assert mean.values() == [2.0, None]
    mean.add([torch.tensor([5.0])], start=1)
    assert mean.values() == [2.0, 5.0]


def test_token_correlation_is_the_mean_over_pairs() -> None:
    h = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True] * 5, [False, True, True, True, False]])
    centred = h - h.mean(dim=-1, keepdim=True)
    cosines = [
        torch.cosine_similarity(centred[b, i], centred[b, j], dim=0).item()
        for b in range(2)
        for i in range(5)
        for j in range(5)
        if i != j and valid[b, i] and valid[b, j]
    ]
    expected = sum(cosines) / len(cosines)
    assert token_correlation(h, valid) == pytest.approx(expected, abs=1e-6)
    assert token_correlation(h[:, :1].expand(-1, 5, -1), valid) == pytest.approx(1.0, abs=1e-6)
    assert token_correlation(h[:, :1], valid[:, :1]) == 0.0


def test_padding_changes_nothing() -> None:
    model = random_model(small_config())
    tokens = random_tokens(model.config, 1, 6)
    alone = trace_loops(model, tokens, 3)
    padded = torch.cat([torch.zeros(1, 2, dtype=tokens.dtype), tokens], dim=1)
    valid = torch.tensor([[False] * 2 + [True] * 6])
    trace = trace_loops(model, padded, 3, valid=valid)
    assert trace.num_tokens == 6
    assert trace.state_norm == pytest.approx(alone.state_norm, rel=1e-5)
    assert trace.token_correlation == pytest.approx(alone.token_correlation, abs=1e-5)


def test_trace_is_json_and_has_no_rho_without_decay() -> None:
    model = random_model(small_config(injection=AddInjectionConfig()))
    trace = trace_loops(model, random_tokens(model.config, 1, 4), 2)
    assert trace.rho is None
    assert json.loads(json.dumps(trace.to_dict()))["step_ratio"][0] is None


def test_trace_needs_no_gradient_and_keeps_the_model() -> None:
    model = random_model(small_config())
    model.train()
    trace_loops(model, random_tokens(model.config, 1, 4), 2)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_bad_input_is_named() -> None:
    model = random_model(small_config())
    tokens = random_tokens(model.config, 1, 4)
    with pytest.raises(ValueError, match="num_loops is 0"):
        trace_loops(model, tokens, 0)
    with pytest.raises(ValueError, match="marks no token"):
        trace_loops(model, tokens, 2, valid=torch.zeros(1, 4, dtype=torch.bool))
