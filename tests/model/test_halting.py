import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmythos.config import (
    ACTConfig,
    ExitGateConfig,
    HaltingConfig,
    PonderNetConfig,
    SinusoidalLoopConfig,
    UniversalACTConfig,
)
from openmythos.model.context import select_rows
from openmythos.model.halting import (
    ACT,
    HALTING_HEADS,
    Geometric,
    Halting,
    Tracker,
    UniversalACT,
    make_halting,
)
from tests.strategies import random_model, random_tokens, small_config

PROBS = st.lists(
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=12
)


def act(**changes) -> ACT:
    return ACT(small_config(d_model=4), ACTConfig(**changes))


def distribution(head: Halting, probs: torch.Tensor) -> tuple[torch.Tensor, Tracker]:
    """The weights of all loops, from their halting probabilities, and the final tracker."""
    tracker, weights = head.start(probs[0][..., None]), []
    for loop, prob in enumerate(probs):
        weight, tracker = head.step(tracker, prob, last=loop == len(probs) - 1)
        weights.append(weight)
    return torch.stack(weights), tracker


def made(config) -> Halting:
    return make_halting(small_config(d_model=4, halting=config))


@settings(max_examples=100)
@given(PROBS)
@pytest.mark.parametrize("kind", ["act", "universal_act", "pondernet", "exit_gate"])
def test_weights_sum_to_one_at_every_budget(kind, probs):
    members = (ACTConfig(), UniversalACTConfig(), PonderNetConfig(), ExitGateConfig())
    (config,) = (member for member in members if member.kind == kind)
    weights, tracker = distribution(made(config), torch.tensor(probs, dtype=torch.float32))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(3))
    torch.testing.assert_close(tracker.mass, torch.ones(3))
    assert (tracker.ponder >= 1 - 1e-6).all()
    assert (tracker.ponder <= len(probs) + 1 + 1e-6).all()


@pytest.mark.parametrize(
    ("probs", "weights", "num_steps", "remainder"),
    [
        # N = min{n : sum h >= 0.99}, R = 1 - sum_{i<N} h_i (Graves, equations 5 to 9)
        ([0.1, 0.3, 0.5, 0.4, 0.9], [0.1, 0.3, 0.5, 0.1, 0.0], 4, 0.1),
        ([0.995, 0.5, 0.5], [1.0, 0.0, 0.0], 1, 1.0),
        ([0.2, 0.2, 0.2], [0.2, 0.2, 0.6], 3, 0.6),  # the budget ends first
        ([0.6, 0.39, 0.9], [0.6, 0.4, 0.0], 2, 0.4),  # exactly at the threshold
        ([0.3], [1.0], 1, 1.0),
    ],
)
def test_graves_numbers_by_hand(probs, weights, num_steps, remainder):
    got, tracker = distribution(act(), torch.tensor(probs, dtype=torch.float64)[:, None])
    torch.testing.assert_close(got[:, 0], torch.tensor(weights, dtype=torch.float64))
    assert float(tracker.ponder) == pytest.approx(num_steps + remainder)


def test_the_ponder_gradient_is_minus_one_before_the_last_step_and_zero_there():
    probs = torch.tensor([0.1, 0.3, 0.5, 0.4, 0.9], dtype=torch.float64, requires_grad=True)
    _, tracker = distribution(act(), probs[:, None])
    tracker.ponder.sum().backward()
    assert probs.grad.tolist() == [-1, -1, -1, 0, 0]


def test_the_number_of_steps_alone_has_no_gradient():
    probs = torch.tensor([0.1, 0.3, 0.5, 0.4], dtype=torch.float64, requires_grad=True)
    weights, tracker = distribution(act(), probs[:, None])
    remainder = 1 - probs[:3].sum()
    (tracker.ponder - remainder).sum().backward()
    assert probs.grad.tolist() == [0, 0, 0, 0]
    assert not tracker.running.any()
    assert weights.shape == (4, 1)


@pytest.mark.parametrize("kind", [PonderNetConfig(), ExitGateConfig()])
def test_the_geometric_distribution_by_hand(kind):
    probs = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)[:, None]
    weights, tracker = distribution(made(kind), probs)
    assert weights[:, 0].tolist() == pytest.approx([0.5, 0.1, 0.4])
    assert float(tracker.ponder) == pytest.approx(0.5 * 1 + 0.1 * 2 + 0.4 * 3)  # E[N]


def test_the_sum_differs_from_the_universal_transformers_interpolation():
    """Four weights of 0.25: Graves' sum keeps them, ``prev = w new + prev (1 - w)`` does not."""
    probs = torch.full((4, 1), 0.25, dtype=torch.float64)
    shares = {}
    for config in (ACTConfig(), *(UniversalACTConfig(readout=r) for r in ("basic", "accumulated"))):
        head = made(config)
        weights, _ = distribution(head, probs)
        assert weights[:, 0].tolist() == [0.25] * 4
        mixed = torch.zeros(1, 4, dtype=torch.float64)
        for state, weight in zip(torch.eye(4, dtype=torch.float64), weights, strict=True):
            mixed = head.mix(mixed, state[None], weight)
        shares[config.kind, getattr(config, "readout", None)] = mixed[0].tolist()
    assert shares["act", None] == shares["universal_act", "accumulated"] == [0.25] * 4
    basic = shares["universal_act", "basic"]
    assert basic == pytest.approx([0.75**3 / 4, 0.75**2 / 4, 0.75 / 4, 0.25], abs=1e-12)
    assert basic == pytest.approx([0.105, 0.141, 0.1875, 0.25], abs=1e-3)
    assert 1 - sum(basic) == pytest.approx(0.316, abs=1e-3)  # on the zero state


@pytest.mark.parametrize("keep", [False, True])
def test_the_universal_transformers_recursion_as_published(keep):
    """tensor2tensor's update, token by token; the weights sum to 1 only if the rest is kept."""
    probs = torch.rand(6, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2
    head = made(UniversalACTConfig(keep_remainder=keep, threshold=0.9))
    assert isinstance(head, UniversalACT)
    weights, tracker = distribution(head, probs)
    unfinished = 0
    for token in range(50):
        hp, rem, n, run = 0.0, 0.0, 0.0, True
        for step, p in enumerate(probs[:, token].tolist()):
            halts = run and (hp + p > 0.9 or (keep and step == 5))
            n, w = n + run, 0.0
            if halts:
                rem = w = 1 - hp
                hp, run = 1.0, False
            elif run:
                hp, w = hp + p, p
            assert float(weights[step, token]) == pytest.approx(w, abs=1e-12)
        unfinished += run
        assert float(tracker.ponder[token]) == pytest.approx(n + rem, abs=1e-12)
        assert float(weights[:, token].sum()) == pytest.approx(hp, abs=1e-12)
    assert (unfinished > 0) == (not keep)


def test_the_universal_transformers_threshold_must_be_passed():
    probs = torch.tensor([0.6, 0.39, 0.9], dtype=torch.float64)[:, None]
    assert distribution(act(), probs)[0][:, 0].tolist() == pytest.approx([0.6, 0.4, 0.0])
    weights, tracker = distribution(made(UniversalACTConfig()), probs)
    assert weights[:, 0].tolist() == pytest.approx([0.6, 0.39, 0.01])
    assert float(tracker.ponder) == pytest.approx(3.01)


@pytest.mark.parametrize(
    ("bias", "loops", "total"),
    [
        (-2.0, 1, 0.124),
        (-2.0, 2, 0.248),
        (-2.0, 4, 0.489),
        (-2.0, 8, 0.952),
        (-4.0, 1, 0.019),
        (-4.0, 8, 0.150),
        (-4.0, 16, 0.300),
        (-4.0, 32, 0.610),
    ],
)
def test_the_originals_lost_mass_is_an_option_only(bias, loops, total):
    """The audit's sums (1a); there the probabilities vary a little between tokens and loops."""
    probs = torch.full((loops, 1), bias).sigmoid()
    lossy, _ = distribution(act(keep_remainder=False), probs)
    assert float(lossy.sum()) == pytest.approx(min(loops * float(probs[0]), 1), abs=1e-6)
    assert float(lossy.sum()) == pytest.approx(total, rel=0.07)
    kept, _ = distribution(act(), probs)
    assert float(kept.sum()) == pytest.approx(1)
    assert ACTConfig().keep_remainder


@pytest.mark.parametrize(("bias", "steps"), [(1.0, 2), (0.0, 2), (-3.0, 21)])
def test_the_bias_sets_the_first_depth(bias, steps):
    weights, _ = distribution(act(), torch.full((40, 1), bias).sigmoid())
    assert int((weights > 0).sum()) == steps


def test_tokens_are_independent_and_a_tracker_can_be_selected():
    head = act()
    probs = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    weights, tracker = distribution(head, probs)
    for token in range(5):
        alone, _ = distribution(head, probs[:, token : token + 1])
        torch.testing.assert_close(weights[:, token : token + 1], alone)
    part = select_rows(head.start(torch.zeros(5, 4)), torch.tensor([4, 1]))
    for loop, prob in enumerate(probs[:, [4, 1]]):
        weight, part = head.step(part, prob, last=loop == 5)
        torch.testing.assert_close(weight, weights[loop, [4, 1]])
    torch.testing.assert_close(part.ponder, tracker.ponder[[4, 1]])


def test_probabilities_are_at_least_fp32():
    head = act().to(torch.bfloat16)
    h = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert head(h).dtype == head.start(h).mass.dtype == torch.float32
    assert act().double()(h.double()).dtype == torch.float64


@pytest.mark.parametrize("config", [ACTConfig(bias_init=-1.0), PonderNetConfig()])
def test_the_models_outputs_are_those_of_the_distribution(config):
    model = random_model(small_config(halting=config))
    out = model(random_tokens(model.config, 2, 5), num_loops=6, keep_states=True)
    states = torch.stack(out.states)
    weights, tracker = distribution(model.halting, model.halting(states))
    torch.testing.assert_close(out.exit_weights, weights)
    torch.testing.assert_close(out.ponder_cost, tracker.ponder)
    ctx = model.context(random_tokens(model.config, 2, 5))
    readout = out.h
    if model.halting.mixes_states:
        readout = (weights[..., None] * states).sum(dim=0)
    torch.testing.assert_close(out.logits, model.decode(readout, ctx))


@pytest.mark.parametrize("readout", ["basic", "accumulated"])
def test_a_head_that_reads_before_sees_what_each_loop_starts_from(readout):
    config = UniversalACTConfig(bias_init=-1.0, readout=readout)
    signal = SinusoidalLoopConfig(num_channels=16, positions=True)
    model = random_model(small_config(halting=config, loop_embedding=signal))
    tokens = random_tokens(model.config, 2, 5)
    ctx = model.context(tokens)
    out = model(tokens, num_loops=6, keep_states=True)
    before = [torch.zeros(2, 5, 16), *out.states[:-1]]
    read = [model.signal(h, torch.full((2,), t), ctx) for t, h in enumerate(before)]
    weights, tracker = distribution(model.halting, model.halting(torch.stack(read)))
    torch.testing.assert_close(out.exit_weights, weights)
    torch.testing.assert_close(out.ponder_cost, tracker.ponder)
    mixed = torch.zeros(2, 5, 16)
    for w, h in zip(weights[..., None], out.states, strict=True):
        mixed = w * h + mixed * (1 - w if readout == "basic" else 1)
    torch.testing.assert_close(out.logits, model.decode(mixed, ctx))
    after = model.halting(torch.stack(out.states))
    assert not torch.allclose(distribution(model.halting, after)[0], weights)


def test_every_member_has_a_head_and_no_config_has_none():
    assert set(HALTING_HEADS) == set(typing.get_args(HaltingConfig))
    assert make_halting(small_config()) is None
    assert isinstance(made(ExitGateConfig()), Geometric)
    out = random_model(small_config())(torch.zeros(1, 2, dtype=torch.int64))
    assert out.exit_weights is None
    assert out.ponder_cost is None
