"""Learned halting: a halting head gives each token a distribution over its loops.

The head reads the state after each loop, or before it. ``Tracker`` carries what is needed from one
loop to the next, so that training, which runs all loops, and decoding, which may stop after any
loop, use the same code.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from openmythos.config import (
    ACTConfig,
    ExitGateConfig,
    HaltingConfig,
    ModelConfig,
    PonderNetConfig,
    UniversalACTConfig,
)


@dataclass(frozen=True)
class Tracker:
    """Per token: the sum of the weights so far, whether it still runs, its ponder cost so far.

    ``mass`` is the sum of halting probabilities in ACT, and 1 - prod(1 - lambda) in ``Geometric``.
    """

    mass: Float[Tensor, "*N"]
    running: Bool[Tensor, "*N"]
    ponder: Float[Tensor, "*N"]


class Halting(nn.Module):
    """A halting head: one halting probability per token and loop.

    It reads the state after the loop or, with ``reads_before``, the state before it. With
    ``mixes_states`` the readout is a weighted mixture of states (``mix``), otherwise the last one.
    """

    mixes_states = False
    reads_before = False

    def __init__(self, config: ModelConfig, part: HaltingConfig) -> None:
        super().__init__()
        self.bias_init = part.bias_init
        self.proj = nn.Linear(config.d_model, 1)

    def init_weights(self) -> None:
        """Make the probability the same for all states: sigmoid(``bias_init``)."""
        self.proj.weight.zero_()
        self.proj.bias.fill_(self.bias_init)

    def forward(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
        """Halting probabilities, in at least fp32."""
        logit = self.proj(h)[..., 0]
        return (logit if logit.dtype == torch.float64 else logit.float()).sigmoid()

    def start(self, h: Float[Tensor, "... D"]) -> Tracker:
        """The tracker before the first loop."""
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(h.shape[:-1], dtype=wide, device=h.device)
        return Tracker(zeros, torch.ones_like(zeros, dtype=torch.bool), torch.zeros_like(zeros))

    def step(
        self, tracker: Tracker, prob: Float[Tensor, "..."], *, last: bool
    ) -> tuple[Float[Tensor, "..."], Tracker]:
        """The loop's weight, and the tracker after it; ``last``: the weight is the remainder."""
        raise TypeError(f"{type(self).__name__} defines no halting recursion")

    def mix(
        self,
        mixed: Float[Tensor, "... D"],
        h: Float[Tensor, "... D"],
        weight: Float[Tensor, "..."],
    ) -> Float[Tensor, "... D"]:
        """Add a loop's state to the mixture, which starts as zeros."""
        return mixed + weight[..., None].to(h.dtype) * h


class ACT(Halting):
    """Adaptive computation time.

    A token halts at the first loop N at which its halting probabilities sum to ``threshold``. The
    weights are the probabilities, and the remainder R at loop N; the readout is the weighted sum of
    states. The ponder cost is N + R, whose gradient flows through R only.

    Source: Graves 2016 (arXiv 1603.08983), equations 5 to 9.
    """

    mixes_states = True

    def __init__(self, config: ModelConfig, part: ACTConfig) -> None:
        super().__init__(config, part)
        self.threshold, self.keep_remainder = part.threshold, part.keep_remainder

    def reached(self, mass: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether the sum of the halting probabilities is enough to halt."""
        return mass >= self.threshold

    def step(
        self, tracker: Tracker, prob: Float[Tensor, "..."], *, last: bool
    ) -> tuple[Float[Tensor, "..."], Tracker]:
        """See ``Halting.step``."""
        running = tracker.running
        halts = running & self.reached(tracker.mass + prob)
        if last and self.keep_remainder:
            halts = running
        remainder = (1 - tracker.mass).clamp(min=0)
        weight = torch.where(halts, remainder, prob) * running
        ponder = tracker.ponder + running + torch.where(halts, remainder, 0)
        mass = tracker.mass + weight
        return weight, Tracker(mass, running & ~halts, ponder)


class UniversalACT(ACT):
    """The Universal Transformer's ACT: the head reads the state before the loop.

    The weights w are those of ``ACT``, except that the sum must exceed the threshold. The ``basic``
    readout becomes w state + (1 - w) readout at each loop, from zero: with four weights of 1/4, the
    states count .105, .141, .188 and .25, which sum to .684 and not to 1.

    Source: tensor2tensor, universal_transformer_util.py, universal_transformer_act.
    """

    reads_before = True

    def __init__(self, config: ModelConfig, part: UniversalACTConfig) -> None:
        super().__init__(config, part)
        self.accumulates = part.readout == "accumulated"

    def reached(self, mass: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """See ``ACT.reached``."""
        return mass > self.threshold

    def mix(
        self,
        mixed: Float[Tensor, "... D"],
        h: Float[Tensor, "... D"],
        weight: Float[Tensor, "..."],
    ) -> Float[Tensor, "... D"]:
        """See ``Halting.mix``."""
        if self.accumulates:
            return super().mix(mixed, h, weight)
        return torch.lerp(mixed, h, weight[..., None].to(h.dtype))


class Geometric(Halting):
    """``p_n = lambda_n prod_{j<n} (1 - lambda_j)``, with lambda = 1 at the last loop.

    Used for PonderNet and Ouro's exit gate, which differ in the training objective. The p_n weight
    the losses of the loops; states are not mixed. The ponder cost is the expected number of loops.

    Source: PonderNet (arXiv 2107.05407), equation 2; Ouro (arXiv 2510.25741), section 3.
    """

    def step(
        self, tracker: Tracker, prob: Float[Tensor, "..."], *, last: bool
    ) -> tuple[Float[Tensor, "..."], Tracker]:
        """See ``Halting.step``."""
        left = 1 - tracker.mass
        # The last loop gives the head zeros as gradient: of a rank's one loop others wait for them.
        weight = torch.where(tracker.running, left, prob) if last else prob * left
        return weight, replace(tracker, mass=tracker.mass + weight, ponder=tracker.ponder + left)


HALTING_HEADS: dict[type, type[Halting]] = {
    ACTConfig: ACT,
    UniversalACTConfig: UniversalACT,
    PonderNetConfig: Geometric,
    ExitGateConfig: Geometric,
}


def make_halting(config: ModelConfig) -> Halting | None:
    """The halting head that the config names."""
    part = config.halting
    return None if part is None else HALTING_HEADS[type(part)](config, part)
