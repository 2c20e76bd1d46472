"""Learned halting: a distribution over the loops of each token that always sums to 1.

A head reads the state after each loop, or the one before it. ``Tracker`` carries what is needed
from loop to loop, so the same code serves training, where all loops are seen, and decoding, where
they come one by one.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
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
    """Per token: mass already given out, whether it still runs, its ponder cost.

    ``mass`` of ACT is the sum of exit probabilities; of the geometric kind, 1 - prod(1 - lambda).
    """

    mass: Float[Tensor, "*N"]
    running: Bool[Tensor, "*N"]
    ponder: Float[Tensor, "*N"]

    def select(self, index: Int[Tensor, "M"]) -> "Tracker":
        """Some of the tokens."""
        return Tracker(self.mass[index], self.running[index], self.ponder[index])

    def put(self, index: Int[Tensor, "M"], rows: "Tracker") -> "Tracker":
        """These rows in place of those at ``index``."""
        return Tracker(
            self.mass.index_copy(0, index, rows.mass),
            self.running.index_copy(0, index, rows.running),
            self.ponder.index_copy(0, index, rows.ponder),
        )


class Halting(nn.Module):
    """The head: one exit probability a token and loop.

    It reads the state after the loop or, with ``reads_before``, the one that the loop starts from.
    With ``mixes_states`` the readout is a mixture of states (``mix``), otherwise the last state.
    """

    mixes_states = False
    reads_before = False

    def __init__(self, config: ModelConfig, part: HaltingConfig) -> None:
        super().__init__()
        self.bias_init = part.bias_init
        self.proj = nn.Linear(config.d_model, 1)

    def init_weights(self) -> None:
        """Start at one probability for all states."""
        self.proj.weight.zero_()
        self.proj.bias.fill_(self.bias_init)

    def forward(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
        """Exit probabilities, at least in fp32."""
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
        """The weight of this loop, and the tracker after it; the last loop takes what is left."""
        raise TypeError(f"{type(self).__name__} defines no halting recursion")

    def mix(
        self,
        mixed: Float[Tensor, "... D"],
        h: Float[Tensor, "... D"],
        weight: Float[Tensor, "..."],
    ) -> Float[Tensor, "... D"]:
        """The mixture with this loop's state in it; it starts as zeros."""
        return mixed + weight[..., None].to(h.dtype) * h

    def distribution(self, probs: Float[Tensor, "L ..."]) -> tuple[Float[Tensor, "L ..."], Tracker]:
        """Weights of all loops from their exit probabilities, and the final tracker."""
        tracker, weights = self.start(probs[0][..., None]), []
        for loop, prob in enumerate(probs):
            weight, tracker = self.step(tracker, prob, last=loop == len(probs) - 1)
            weights.append(weight)
        return torch.stack(weights), tracker


class ACT(Halting):
    """Adaptive computation time: weights h_1, h_2 ..., then the remainder R at loop N.

    The ponder cost is N + R; its gradient goes through R alone. The readout is the weighted state.

    Source: Graves 2016 (arXiv 1603.08983), equations 5 to 9.
    """

    mixes_states = True

    def __init__(self, config: ModelConfig, part: ACTConfig) -> None:
        super().__init__(config, part)
        self.threshold, self.keep_remainder = part.threshold, part.keep_remainder

    def reached(self, mass: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether the exit probabilities are enough to halt."""
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
    """The Universal Transformer's: probabilities of the state before the loop, its own readout.

    The weights w are Graves', but for a strict threshold. ``basic`` readouts are new w + old
    (1 - w): four weights of 1/4 leave .105, .141, .188 and .25 of the states and .316 of zero.

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
    """``p_n = lambda_n prod_{j<n} (1 - lambda_j)`` with lambda := 1 at the last loop.

    PonderNet and Ouro's exit gate; they differ in the objective. The loss is weighted, not the
    state. The ponder cost is the expected number of loops.

    Source: PonderNet (arXiv 2107.05407), equation 2; Ouro (arXiv 2510.25741), section 3.
    """

    def step(
        self, tracker: Tracker, prob: Float[Tensor, "..."], *, last: bool
    ) -> tuple[Float[Tensor, "..."], Tracker]:
        """See ``Halting.step``."""
        left = 1 - tracker.mass
        weight = left if last else prob * left
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
