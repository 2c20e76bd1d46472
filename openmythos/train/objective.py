"""Objectives: the loss of the last loop, of every loop, weighted by the halting head, or of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from openmythos.config import ACTConfig, HaltingConfig
from openmythos.config.schema import require, require_literals
from openmythos.model.context import ForwardContext
from openmythos.model.recurrent import ModelOutput, RecurrentDepthLM
from openmythos.ops.cross_entropy import IGNORED, cross_entropy

Losses = tuple[Float[Tensor, ""], Float[Tensor, ""]]


def own_loops(num_loops: Int[Tensor, "B"]) -> Int[Tensor, "L B"]:
    """Each row's own loop index at every loop of the batch.

    Rows of unequal depth are aligned at their last loop; a row that has not started yet has a
    negative index.
    """
    most = num_loops.max()
    loops = torch.arange(int(most), device=num_loops.device)
    return loops[:, None] - (most - num_loops)


def geometric_log_prior(loop_idx: Int[Tensor, "L B"], rate: float) -> Float[Tensor, "L B"]:
    """Geometric distribution over each row's own loops, truncated at its depth and renormalised.

    As logarithms: a steep prior underflows. 0 at loops that a row does not run.

    Source: PonderNet (arXiv 2107.05407), section 2.3.
    """
    own, logs = loop_idx >= 0, loop_idx.double() * math.log1p(-rate)
    total = logs.masked_fill(~own, -math.inf).logsumexp(dim=0)
    return (logs - total).masked_fill(~own, 0.0)


def kl_divergence(
    exit_weights: Float[Tensor, "L *N"], log_prior: Float[Tensor, "L ..."]
) -> Float[Tensor, "*N"]:
    """KL(exit_weights || prior), summed over loops; a weight of 0 contributes exactly 0."""
    tiny = torch.finfo(exit_weights.dtype).tiny
    logs = exit_weights.clamp(min=tiny).log() - log_prior.to(exit_weights)
    return (exit_weights * logs).sum(dim=0)


def mean_over(values: Float[Tensor, "*N"], counted: Bool[Tensor, "*N"]) -> Float[Tensor, ""]:
    """Mean over the tokens that have a loss."""
    return (values * counted).sum() / counted.sum().clamp(min=1)


def loop_logits(
    model: RecurrentDepthLM, output: ModelOutput, ctx: ForwardContext
) -> Iterator[Float[Tensor, "B T V"]]:
    """Logits of every kept state; those of the last one come from the forward where possible."""
    for h in output.states[:-1]:
        yield model.decode(h, ctx)
    mixes = model.halting is not None and model.halting.mixes_states
    yield model.decode(output.states[-1], ctx) if mixes else output.logits


@dataclass(frozen=True, kw_only=True)
class FinalLoopObjective:
    """Cross-entropy of the last loop's readout, plus z-loss and, with ACT, the ponder cost.

    Attributes:
        z_loss: Weight of the squared log-partition function, which keeps the logits small.
        ponder_weight: Weight of ACT's cost of loops; needs model.halting.kind=act or universal_act.

    Source: Graves 2016 (arXiv 1603.08983), equation 9, for the ponder cost.
    """

    kind: ClassVar[str] = "final_loop"
    needs_states: ClassVar[bool] = False
    trains_gate_only: ClassVar[bool] = False
    z_loss: float = 0.0
    ponder_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("z_loss", "ponder_weight"):
            value = getattr(self, name)
            require(value >= 0, f"objective.{name}", value, "at least 0")

    def check(self, halting: HaltingConfig | None) -> None:
        """Check that the objective works with the model's halting head.

        Raises:
            ValueError: It needs a different one.
        """
        if self.ponder_weight and not isinstance(halting, ACTConfig):
            # Other heads get no gradient from the last loop's loss that could balance the cost.
            raise ValueError(
                f"objective.ponder_weight is {self.ponder_weight}, which needs "
                f"model.halting.kind=act; it is {_kind(halting)}"
            )

    def loss(
        self,
        model: RecurrentDepthLM,
        output: ModelOutput,
        targets: Int[Tensor, "B T"],
        ctx: ForwardContext,
        num_loops: Int[Tensor, "B"],
    ) -> Losses:
        """The loss to minimise, and the plain cross-entropy of the output (nats per token).

        ``num_loops`` stays on the CPU, as in the forward, so that nothing waits for the device.
        """
        self.check(model.config.halting)
        counted = targets != IGNORED
        nats = mean_over(cross_entropy(output.logits, targets), counted)
        loss = nats
        if self.z_loss:
            loss = mean_over(cross_entropy(output.logits, targets, self.z_loss), counted)
        if self.ponder_weight and output.ponder_cost is not None:
            loss = loss + self.ponder_weight * mean_over(output.ponder_cost, counted)
        return loss, nats.detach()


@dataclass(frozen=True, kw_only=True)
class PerLoopObjective:
    """Cross-entropy of every loop's readout, averaged over the loops that each row runs.

    Attributes:
        z_loss: Weight of the squared log-partition function, which keeps the logits small.
        targets_per_loop: 0: every loop has the same targets. Otherwise only the last token is read,
            and its target after a row's own loop t is that of token t times this, or the last one:
            where targets are results on the way, each loop is trained to take so many steps. Every
            token must then have a target.
    """

    kind: ClassVar[str] = "per_loop"
    needs_states: ClassVar[bool] = True
    trains_gate_only: ClassVar[bool] = False
    z_loss: float = 0.0
    targets_per_loop: int = 0

    def __post_init__(self) -> None:
        for name in ("z_loss", "targets_per_loop"):
            value = getattr(self, name)
            require(value >= 0, f"objective.{name}", value, "at least 0")

    def check(self, halting: HaltingConfig | None) -> None:
        """Any halting head is fine: the objective does not read it."""

    def loss(
        self,
        model: RecurrentDepthLM,
        output: ModelOutput,
        targets: Int[Tensor, "B T"],
        ctx: ForwardContext,
        num_loops: Int[Tensor, "B"],
    ) -> Losses:
        """See ``FinalLoopObjective.loss``."""
        if self.targets_per_loop and bool((targets == IGNORED).any()):
            raise ValueError(
                f"objective.targets_per_loop={self.targets_per_loop} needs a target at each token: "
                "a step weighs rows by their targets, and this objective reads one of each"
            )
        own = own_loops(num_loops)
        weights = (own >= 0) / num_loops.double()
        loss, wanted = torch.zeros((), device=targets.device), targets
        logits_of_loops = loop_logits(model, output, ctx)
        for loop, weight, logits in zip(own, weights, logits_of_loops, strict=True):
            wanted = self._targets_of(loop, targets)
            nats = cross_entropy(logits, wanted, self.z_loss)
            loss = loss + mean_over(weight[:, None].to(nats) * nats, wanted != IGNORED)
        nats = mean_over(cross_entropy(output.logits.detach(), wanted), wanted != IGNORED)
        return loss, nats

    def _targets_of(self, loop: Int[Tensor, "B"], targets: Int[Tensor, "B T"]) -> Tensor:
        if not self.targets_per_loop:
            return targets
        last = targets.shape[1] - 1
        place = ((loop + 1) * self.targets_per_loop).clamp(0, last).to(targets.device)
        wanted = torch.full_like(targets, IGNORED)
        wanted[:, last] = targets.gather(1, place[:, None])[:, 0]
        return wanted


@dataclass(frozen=True, kw_only=True)
class ExitWeightedObjective:
    """sum_t p_t CE_t, plus ``kl_weight`` KL(p || geometric) minus ``entropy_weight`` H(p).

    p_t is the halting head's probability of loop t, H(p) its entropy. PonderNet uses the KL term,
    Ouro's first stage the entropy term.

    Attributes:
        kl_weight: Weight of KL(p || geometric prior), PonderNet's term.
        prior_rate: Exit probability per loop of that prior.
        entropy_weight: Weight of the entropy of p, Ouro's term.
        z_loss: Weight of the squared log-partition function, which keeps the logits small.

    Source: PonderNet (arXiv 2107.05407), equation 3; Ouro (arXiv 2510.25741), equation 4.
    """

    kind: ClassVar[str] = "exit_weighted"
    needs_states: ClassVar[bool] = True
    trains_gate_only: ClassVar[bool] = False
    kl_weight: float = 0.0
    prior_rate: float = 0.2
    entropy_weight: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kl_weight", "entropy_weight", "z_loss"):
            value = getattr(self, name)
            require(value >= 0, f"objective.{name}", value, "at least 0")
        require(0 < self.prior_rate < 1, "objective.prior_rate", self.prior_rate, "in (0, 1)")

    def check(self, halting: HaltingConfig | None) -> None:
        """See ``FinalLoopObjective.check``."""
        _require_gate(self.kind, halting)

    def loss(
        self,
        model: RecurrentDepthLM,
        output: ModelOutput,
        targets: Int[Tensor, "B T"],
        ctx: ForwardContext,
        num_loops: Int[Tensor, "B"],
    ) -> Losses:
        """See ``FinalLoopObjective.loss``."""
        self.check(model.config.halting)
        assert output.exit_weights is not None
        counted, weights = targets != IGNORED, output.exit_weights
        loss = torch.zeros((), dtype=weights.dtype, device=weights.device)
        # A row that has not started yet has weight 0.
        for weight, logits in zip(weights, loop_logits(model, output, ctx), strict=True):
            nats = cross_entropy(logits, targets, self.z_loss)
            loss = loss + mean_over(weight * nats, counted)
        if self.kl_weight:
            prior = geometric_log_prior(own_loops(num_loops), self.prior_rate)
            divergence = kl_divergence(weights, prior[..., None])
            loss = loss + self.kl_weight * mean_over(divergence, counted)
        if self.entropy_weight:
            negative_entropy = kl_divergence(weights, torch.zeros_like(weights))
            loss = loss + self.entropy_weight * mean_over(negative_entropy, counted)
        return loss, mean_over(cross_entropy(output.logits.detach(), targets), counted)


@dataclass(frozen=True, kw_only=True)
class ExitGainObjective:
    """Trains the exit gate alone, on what each loop gains: the second stage of Ouro.

    The gain of loop t is I_t = max(0, CE_{t-1} - CE_t), per token and without a gradient. The
    gate's probability of going on is trained by binary cross-entropy to be
    w = sigmoid(``slope`` (I - ``least_gain``)); the losses of the T - 1 loops that have a label are
    summed and divided by T. All other weights keep their values.

    With ``label`` "reached", as printed in the paper, the gate at loop t = 2 .. T has the label of
    I_t, which loop t has brought: the gate at loop 1 is not trained, and that at loop T is, which
    no exit rule reads. With "next", the gate at loop t = 1 .. T-1 has the label of I_{t+1}, which
    going on would bring.

    Attributes:
        slope: How sharply the gain decides: its factor in a sigmoid, per nat.
        least_gain: Gain of one loop, in nats, below which a token should stop.
        label: Whether a loop's gate learns from the gain that the loop brought, or from that of the
            next one.

    Source: Ouro (arXiv 2510.25741), equations 5 and 6.
    """

    kind: ClassVar[str] = "exit_gain"
    needs_states: ClassVar[bool] = True
    trains_gate_only: ClassVar[bool] = True
    slope: float = 50.0
    least_gain: float = 0.005
    label: Literal["reached", "next"] = "reached"

    def __post_init__(self) -> None:
        require(self.slope > 0, "objective.slope", self.slope, "above 0")
        require(self.least_gain >= 0, "objective.least_gain", self.least_gain, "at least 0")
        require_literals(self)

    def check(self, halting: HaltingConfig | None) -> None:
        """See ``FinalLoopObjective.check``."""
        _require_gate(self.kind, halting)

    def loss(
        self,
        model: RecurrentDepthLM,
        output: ModelOutput,
        targets: Int[Tensor, "B T"],
        ctx: ForwardContext,
        num_loops: Int[Tensor, "B"],
    ) -> Losses:
        """See ``FinalLoopObjective.loss``."""
        self.check(model.config.halting)
        assert model.halting is not None
        counted = targets != IGNORED
        with torch.no_grad():
            logits = loop_logits(model, output, ctx)
            nats = torch.stack([cross_entropy(each, targets) for each in logits])
        gain = (nats[:-1] - nats[1:]).clamp(min=0)
        stay = torch.sigmoid(self.slope * (gain - self.least_gain))
        # Its logit, because the sigmoid may round to 1.
        gates = torch.stack([model.halting.proj(h.detach())[..., 0] for h in output.states])
        gates = (gates[1:] if self.label == "reached" else gates[:-1]).to(stay.dtype)
        losses = functional.binary_cross_entropy_with_logits(gates, 1 - stay, reduction="none")
        # A row has a gain at those of its own loops that follow one of its own.
        weights = ((own_loops(num_loops)[:-1] >= 0) / num_loops.double()).to(losses)
        loss = mean_over((weights[..., None] * losses).sum(dim=0), counted)
        return loss, mean_over(nats[-1], counted)


def _require_gate(kind: str, halting: HaltingConfig | None) -> None:
    if halting is None or isinstance(halting, ACTConfig):
        raise ValueError(
            f"objective {kind} needs model.halting.kind=pondernet or exit_gate; "
            f"it is {_kind(halting)}"
        )


def _kind(halting: HaltingConfig | None) -> str:
    return "null" if halting is None else halting.kind


ObjectiveConfig = FinalLoopObjective | PerLoopObjective | ExitWeightedObjective | ExitGainObjective
