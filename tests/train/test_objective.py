import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from openmythos.config import ACTConfig, ExitGateConfig, PonderNetConfig, UniversalACTConfig
from openmythos.model.recurrent import ModelOutput, RecurrentDepthLM
from openmythos.train.objective import (
    ExitGainObjective,
    ExitWeightedObjective,
    FinalLoopObjective,
    PerLoopObjective,
    geometric_log_prior,
    kl_divergence,
    own_loops,
)
from tests.strategies import random_model, random_tokens, small_config, unchecked

ROWS, LENGTH = 3, 6


def model_with(halting: Any) -> RecurrentDepthLM:
    return random_model(small_config(halting=halting), dtype=torch.float64).train()


def forward(
    model: RecurrentDepthLM, depths: list[int], *, keep: bool = True
) -> tuple[ModelOutput, torch.Tensor, Any, torch.Tensor]:
    tokens = random_tokens(model.config, ROWS, LENGTH)
    targets = random_tokens(model.config, ROWS, LENGTH, seed=1)
    targets[0, :4] = -100
    ctx, num_loops = model.context(tokens), torch.tensor(depths)
    output = model(tokens, num_loops=num_loops, ctx=ctx, keep_states=keep)
    return output, targets, ctx, num_loops


def nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


# --- distributions -------------------------------------------------------------------------------


def test_own_loops_are_aligned_at_the_last() -> None:
    assert own_loops(torch.tensor([3, 1, 2])).T.tolist() == [[0, 1, 2], [-2, -1, 0], [-1, 0, 1]]


def test_prior_is_truncated_and_renormalised() -> None:
    prior = geometric_log_prior(own_loops(torch.tensor([3, 2])), 0.2).exp()
    assert prior[0, 1] == 1  # the second row has not started: its exit weight is 0
    prior[0, 1] = 0
    raw = torch.tensor([0.2, 0.16, 0.128], dtype=torch.float64)
    assert torch.allclose(prior[:, 0], raw / 0.488)
    assert torch.allclose(prior[:, 1], torch.tensor([0, 0.2 / 0.36, 0.16 / 0.36]).double())
    assert torch.allclose(prior.sum(dim=0), torch.ones(2, dtype=torch.float64))


def test_kl_direction_by_hand() -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    forwards = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.2)
    backwards = 0.5 * math.log(0.5 / 0.7) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.1)
    assert forwards == pytest.approx(0.0851, abs=1e-4)
    assert backwards == pytest.approx(0.0920, abs=1e-4)
    assert kl_divergence(p[:, None], prior[:, None].log()).item() == pytest.approx(
        forwards, abs=1e-12
    )


def test_kl_where_p_is_zero_is_finite_with_its_gradient() -> None:
    p = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    value = kl_divergence(p, torch.full((2, 1), math.log(0.5)))
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(2))
    assert p.grad is not None and torch.isfinite(p.grad).all()


@pytest.mark.parametrize(("rate", "expected"), [(0.99, 140.9140), (0.2, 4.4796), (1e-6, 0.0)])
def test_kl_to_a_steep_prior_does_not_underflow(rate: float, expected: float) -> None:
    log_prior = geometric_log_prior(own_loops(torch.tensor([64, 1])), rate)
    weights = torch.full((64, 2), 1 / 64)
    weights[:, 1] = torch.arange(64) == 63  # its only loop
    weights.requires_grad_()
    value = kl_divergence(weights, log_prior)
    assert value.dtype == torch.float32
    # By the sum: log(1/64) - log(r) - log(1-r) 63/2 + log(1 - (1-r)^64).
    exact = -math.log(64) - math.log(rate) - math.log1p(-rate) * 31.5
    exact += math.log(-math.expm1(64 * math.log1p(-rate)))
    assert exact == pytest.approx(expected, abs=1e-4)
    assert value.tolist() == pytest.approx([exact, 0.0], rel=1e-5, abs=1e-5)
    value.sum().backward()
    assert weights.grad is not None and torch.isfinite(weights.grad).all()


# --- the last loop -------------------------------------------------------------------------------


def test_final_loop_is_the_mean_over_counted_tokens() -> None:
    model = model_with(None)
    output, targets, ctx, depths = forward(model, [2, 2, 2], keep=False)
    loss, plain = FinalLoopObjective().loss(model, output, targets, ctx, depths)
    expected = functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert plain.item() == loss.item()
    assert not plain.requires_grad


def test_z_loss_by_its_definition() -> None:
    model = model_with(None)
    output, targets, ctx, depths = forward(model, [2, 2, 2], keep=False)
    loss, plain = FinalLoopObjective(z_loss=0.01).loss(model, output, targets, ctx, depths)
    log_z = output.logits.logsumexp(dim=-1)[targets != -100]
    assert (loss - plain).item() == pytest.approx(0.01 * log_z.square().mean().item(), abs=1e-12)


@pytest.mark.parametrize(
    "halting",
    [
        ACTConfig(bias_init=-1.0, threshold=0.99),
        UniversalACTConfig(bias_init=-1.0),
        UniversalACTConfig(bias_init=-1.0, readout="accumulated"),
    ],
)
def test_ponder_cost_pulls_through_the_remainder_alone(halting: Any) -> None:
    model = model_with(halting)
    output, targets, ctx, depths = forward(model, [3, 3, 3], keep=False)
    objective = FinalLoopObjective(ponder_weight=0.5)
    loss, plain = objective.loss(model, output, targets, ctx, depths)
    assert output.ponder_cost is not None and output.exit_weights is not None
    cost = output.ponder_cost[targets != -100].mean()
    assert (loss - plain).item() == pytest.approx(0.5 * cost.item(), abs=1e-12)
    # N is a count: what is left of the cost's gradient is that of R = 1 - (weights before N).
    (direct,) = torch.autograd.grad(cost, model.halting.proj.bias, retain_graph=True)
    halts_at = (output.exit_weights > 0).sum(dim=0) - 1
    remainder = output.exit_weights.gather(0, halts_at[None])[0]
    (through_r,) = torch.autograd.grad(
        remainder[targets != -100].mean(), model.halting.proj.bias, retain_graph=True
    )
    assert torch.allclose(direct, through_r, atol=1e-12)
    assert direct.item() < 0  # a higher bias leaves a smaller remainder


@pytest.mark.parametrize("halting", [ACTConfig(bias_init=-6.0), UniversalACTConfig()])
def test_ponder_cost_of_rows_with_their_own_depth(halting: Any) -> None:
    model = model_with(halting)
    output, targets, ctx, depths = forward(model, [1, 3, 2], keep=False)
    loss, plain = FinalLoopObjective(ponder_weight=1.0).loss(model, output, targets, ctx, depths)
    costs = []
    for row, depth in enumerate([1, 3, 2]):
        alone = model(ctx.tokens[row : row + 1], num_loops=depth)
        assert alone.ponder_cost is not None
        costs.append(alone.ponder_cost[0])
    mean = torch.stack(costs)[targets != -100].mean()
    assert (loss - plain).item() == pytest.approx(mean.item(), abs=1e-12)


# --- every loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("halting", [None, ACTConfig(bias_init=-1.0)])
def test_per_loop_is_the_mean_over_the_loops(halting: Any) -> None:
    model = model_with(halting)
    output, targets, ctx, depths = forward(model, [3, 3, 3])
    loss, plain = PerLoopObjective().loss(model, output, targets, ctx, depths)
    counted = targets != -100
    each = [nats(model.decode(h, ctx), targets)[counted].mean() for h in output.states]
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-12)
    assert plain.item() == pytest.approx(nats(output.logits, targets)[counted].mean().item())


def test_per_loop_leaves_out_loops_that_a_row_waited() -> None:
    model, depths = model_with(None), [1, 3, 2]
    output, targets, ctx, num_loops = forward(model, depths)
    loss, _ = PerLoopObjective().loss(model, output, targets, ctx, num_loops)
    per_token = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for row, depth in enumerate(depths):
        one = ctx.tokens[row : row + 1]
        alone = model(one, num_loops=depth, keep_states=True)
        for h in alone.states:
            value = nats(model.decode(h, model.context(one)), targets[row : row + 1])[0]
            per_token[row] += value / depth
    assert loss.item() == pytest.approx(per_token[targets != -100].mean().item(), abs=1e-12)


def test_the_last_readout_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(None)
    output, targets, ctx, depths = forward(model, [3, 3, 3])
    decoded: list[int] = []
    original = model.decode
    monkeypatch.setattr(model, "decode", lambda h, ctx: decoded.append(1) or original(h, ctx))
    PerLoopObjective().loss(model, output, targets, ctx, depths)
    assert len(decoded) == 2


# --- loops weighted by their exit probability ----------------------------------------------------


@pytest.mark.parametrize("halting", [PonderNetConfig(bias_init=-1.0), ExitGateConfig()])
@pytest.mark.parametrize("depths", [[3, 3, 3], [1, 3, 2]])
def test_exit_weighted_by_hand(halting: Any, depths: list[int]) -> None:
    model = model_with(halting)
    output, targets, ctx, num_loops = forward(model, depths)
    objective = ExitWeightedObjective(kl_weight=0.3, prior_rate=0.4, entropy_weight=0.2)
    loss, plain = objective.loss(model, output, targets, ctx, num_loops)
    total = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for row, depth in enumerate(depths):
        one = ctx.tokens[row : row + 1]
        alone = model(one, num_loops=depth, keep_states=True)
        assert alone.exit_weights is not None
        p = alone.exit_weights[:, 0]
        prior = 0.4 * 0.6 ** torch.arange(depth, dtype=torch.float64)
        prior = prior / prior.sum()
        for weight, h in zip(p, alone.states, strict=True):
            total[row] += weight * nats(model.decode(h, model.context(one)), targets[[row]])[0]
        total[row] += 0.3 * (p * (p / prior[:, None]).log()).sum(dim=0)
        total[row] -= 0.2 * torch.special.entr(p).sum(dim=0)
    assert loss.item() == pytest.approx(total[targets != -100].mean().item(), abs=1e-10)
    last = nats(output.logits, targets)[targets != -100].mean()
    assert plain.item() == pytest.approx(last.item(), abs=1e-12)
    loss.backward()
    assert model.halting.proj.weight.grad.abs().sum() > 0


def test_entropy_is_kl_to_uniform_up_to_a_constant() -> None:
    model = model_with(ExitGateConfig())
    arguments = forward(model, [3, 3, 3])
    values = {}
    for beta in (0.0, 0.7):
        objective = ExitWeightedObjective(entropy_weight=beta)
        values[beta] = objective.loss(model, *arguments)[0].item()
    output, targets = arguments[0], arguments[1]
    assert output.exit_weights is not None
    uniform = torch.full_like(output.exit_weights, -math.log(3))
    divergence = kl_divergence(output.exit_weights, uniform)[targets != -100].mean().item()
    # beta KL(p || uniform) = -beta H(p) + beta log T
    assert values[0.7] - values[0.0] == pytest.approx(0.7 * (divergence - math.log(3)), abs=1e-12)


def test_a_prior_of_few_loops_makes_exits_earlier() -> None:
    model = model_with(PonderNetConfig(bias_init=-2.0))
    output, targets, ctx, depths = forward(model, [4, 4, 4])
    objective = ExitWeightedObjective(kl_weight=100.0, prior_rate=0.9)
    objective.loss(model, output, targets, ctx, depths)[0].backward()
    assert model.halting.proj.bias.grad.item() < 0  # a step downhill raises lambda


# --- the gate alone ------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "expected"), [("reached", 0.3253433), ("next", 0.4206570)])
def test_exit_gain_by_numbers(label: Any, expected: float) -> None:
    """Losses 1, 0.6, 0.7 nats gain 0.4 and 0: w = 1 - 3e-9 and sigmoid(-0.25) = 0.4378235.

    With lambda = 0.3, 0.25, 0.6, the labels of the loops that have brought the gains give
    (-log .75 - .4378235 log .4 - .5621765 log .6) / 3, those of the loops before
    (-log .7 - .4378235 log .75 - .5621765 log .25) / 3.
    """
    states = tuple(torch.full((1, 1, 1), float(loop)) for loop in range(3))
    nats, gates = torch.tensor([1.0, 0.6, 0.7]), torch.tensor([0.3, 0.25, 0.6]).logit()

    def decode(h: torch.Tensor, ctx: Any) -> torch.Tensor:
        return torch.stack((torch.zeros(1, 1), nats[h[..., 0].long()].expm1().log()), dim=-1)

    halting = SimpleNamespace(proj=lambda h: gates[h.long()], mixes_states=False)
    config = SimpleNamespace(halting=ExitGateConfig())
    model = SimpleNamespace(halting=halting, config=config, decode=decode)
    output = SimpleNamespace(states=states, logits=decode(states[-1], None))
    with unchecked():
        loss, plain = ExitGainObjective(label=label).loss(
            model, output, torch.zeros(1, 1, dtype=torch.int64), None, torch.tensor([3])
        )
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert plain.item() == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("halting", [PonderNetConfig(bias_init=-1.0), ExitGateConfig()])
@pytest.mark.parametrize("label", ["reached", "next"])
def test_exit_gain_of_rows_with_their_own_depth(halting: Any, label: Any) -> None:
    model, depths = model_with(halting), [1, 3, 2]
    output, targets, ctx, num_loops = forward(model, depths)
    objective = ExitGainObjective(slope=5.0, least_gain=0.1, label=label)
    loss, plain = objective.loss(model, output, targets, ctx, num_loops)
    total = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for row, depth in enumerate(depths):
        one = ctx.tokens[row : row + 1]
        states = model(one, num_loops=depth, keep_states=True).states
        losses = [nats(model.decode(h, model.context(one)), targets[[row]])[0] for h in states]
        for loop in range(1, depth):
            gain = (losses[loop - 1] - losses[loop]).clamp(min=0)
            go_on = torch.sigmoid(5.0 * (gain - 0.1))
            stop = model.halting(states[loop if label == "reached" else loop - 1])[0]
            total[row] -= (go_on * (1 - stop).log() + (1 - go_on) * stop.log()) / depth
    assert loss.item() == pytest.approx(total[targets != -100].mean().item(), abs=1e-10)
    assert plain.item() == pytest.approx(
        nats(output.logits, targets)[targets != -100].mean().item()
    )
    loss.backward()
    learning = {name for name, param in model.named_parameters() if param.grad is not None}
    assert learning == {"halting.proj.weight", "halting.proj.bias"}
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in learning)


def test_exit_gain_of_one_loop_is_zero_and_can_be_trained() -> None:
    model = model_with(ExitGateConfig())
    loss, _ = ExitGainObjective().loss(model, *forward(model, [1, 1, 1]))
    loss.backward()
    assert loss.item() == 0 and model.halting.proj.weight.grad.abs().sum() == 0


def test_a_saturated_gate_still_learns() -> None:
    model = model_with(ExitGateConfig()).float()
    with torch.no_grad():
        model.halting.proj.weight.zero_()
        model.halting.proj.bias.fill_(40.0)
    objective = ExitGainObjective(least_gain=0.0)  # no gain: w = 1/2
    objective.loss(model, *forward(model, [3, 3, 3]))[0].backward()
    assert model.halting.proj.bias.grad.item() > 0.3


# --- errors --------------------------------------------------------------------------------------


def test_a_missing_or_wrong_head_is_named() -> None:
    for halting, objective, said in (
        (None, ExitWeightedObjective(), "needs model.halting.kind=pondernet or exit_gate"),
        (ACTConfig(), ExitWeightedObjective(), "it is act"),
        (UniversalACTConfig(), ExitWeightedObjective(), "it is universal_act"),
        (None, ExitGainObjective(), "exit_gain needs model.halting.kind=pondernet or exit_gate"),
        (ACTConfig(), ExitGainObjective(), "it is act"),
        (None, FinalLoopObjective(ponder_weight=1.0), "needs model.halting.kind=act"),
        (PonderNetConfig(), FinalLoopObjective(ponder_weight=1.0), "it is pondernet"),
    ):
        model = model_with(halting)
        with pytest.raises(ValueError, match=said):
            objective.loss(model, *forward(model, [1, 1, 1]))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: FinalLoopObjective(z_loss=-1.0), "objective.z_loss is -1.0"),
        (lambda: FinalLoopObjective(ponder_weight=-1.0), "objective.ponder_weight is -1.0"),
        (lambda: PerLoopObjective(z_loss=-1.0), "objective.z_loss is -1.0"),
        (lambda: ExitWeightedObjective(kl_weight=-1.0), "objective.kl_weight is -1.0"),
        (lambda: ExitWeightedObjective(prior_rate=1.0), "objective.prior_rate is 1.0"),
        (lambda: ExitGainObjective(slope=0.0), "objective.slope is 0.0"),
        (lambda: ExitGainObjective(least_gain=-1.0), "objective.least_gain is -1.0"),
        (lambda: ExitGainObjective(label="last"), "label is 'last'; it must be one of"),
    ],
)
def test_bad_fields(build: Any, said: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=said):
        build()


def test_targets_along_the_way_by_hand() -> None:
    model = model_with(None)
    output, targets, ctx, depths = forward(model, [3, 2, 1])  # six tokens
    with pytest.raises(ValueError, match="targets_per_loop=2 needs a target at each token"):
        PerLoopObjective(targets_per_loop=2).loss(model, output, targets, ctx, depths)
    targets = targets.clamp(min=0)
    loss, plain = PerLoopObjective(targets_per_loop=2).loss(model, output, targets, ctx, depths)
    by_loop = [model.decode(h, ctx)[:, -1].log_softmax(-1).detach() for h in output.states]
    expected = 0.0
    for row, depth in enumerate([3, 2, 1]):
        for own in range(1, depth + 1):
            place = min(2 * own, 5)
            logits = by_loop[3 - depth + own - 1][row]
            expected -= float(logits[targets[row, place]]) / depth / 3
    assert loss.item() == pytest.approx(expected)
    last = [
        -float(by_loop[-1][row][targets[row, min(2 * d, 5)]]) for row, d in enumerate([3, 2, 1])
    ]
    assert float(plain) == pytest.approx(sum(last) / 3)
