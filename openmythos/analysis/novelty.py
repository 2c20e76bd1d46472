"""Is a loop more than the loop before it once more?

The update of loop t + 1 is replaced by what the update of loop t predicts of it, and the remaining
loops are run. If the answers stay, loop t + 1 brings nothing new. The prediction is fitted on other
texts: one factor for all, or a linear map per position (ridge regression).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.analysis.bootstrap import Interval, defined, interval, resample
from openmythos.analysis.intervention import answer_log_prob, batches
from openmythos.model.context import ForwardContext
from openmythos.model.inference import inference
from openmythos.model.loop import LoopState, advance, readout, start_loops
from openmythos.model.recurrent import RecurrentDepthLM

RIDGE = 0.01  # of the updates' mean square
MIN_HARM = 0.05  # nats

Updates = Float[Tensor, "N T D"]


@dataclass(frozen=True, kw_only=True)
class Novelty:
    """How much of a loop the loop before it does not predict; entries are for the loops from 2 on.

    Novelty is 1 - (log-probability of the answers that the prediction keeps above the floor), as a
    share of what the loop itself keeps: 0 where the prediction is as good as the loop, 1 where it
    is no better than the floor, another text's update at the same loop; more where it is worse.
    None where the floor costs less than ``MIN_HARM``: nothing is asked of the loop.

    Attributes:
        log_prob: Mean log-probability of the answers, in nats, with all loops as they are.
        floor: With another text's update in this loop.
        scalar: With the update of the loop before, times a factor.
        ridge: With a linear map of it per position.
        scalar_novelty: Novelty over the factor.
        ridge_novelty: Novelty over the linear map.
        scalar_interval: 95 % when the examples are drawn again.
        ridge_interval: The same for the linear map.
    """

    log_prob: float
    floor: tuple[float, ...]
    scalar: tuple[float, ...]
    ridge: tuple[float, ...]
    scalar_novelty: tuple[float | None, ...]
    ridge_novelty: tuple[float | None, ...]
    scalar_interval: tuple[Interval | None, ...]
    ridge_interval: tuple[Interval | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return asdict(self)


def novelty(
    model: RecurrentDepthLM,
    tokens: Int[Tensor, "N T"],
    answers: Int[Tensor, "N"],
    num_loops: int,
    *,
    fit: Int[Tensor, "M T"],
    batch_size: int = 256,
    num_samples: int = 1000,
    seed: int = 0,
) -> Novelty:
    """Replace every loop's update but the first one's by predictions from the loop before.

    The halting head, if there is one, decides as it did with the loop's own update.

    Args:
        model: The model.
        tokens: The texts; the answers are read at their last tokens.
        answers: The tokens that should follow them.
        num_loops: Loops to run, at least 2.
        fit: Other texts of the same length: the predictions are fitted on them, and their updates
            are the floor.
        batch_size: Texts that are run together. Of the texts to fit, three states are kept in all.
        num_samples: Samples of the examples for the intervals.
        seed: Of the samples.

    Raises:
        ValueError: ``num_loops`` is below 2, or the texts to fit have another length.
    """
    if num_loops < 2:
        raise ValueError(f"num_loops is {num_loops}; to compare loops give at least 2")
    if fit.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"the texts to fit have {fit.shape[1]} tokens and the others {tokens.shape[1]}; "
            "give texts of one length"
        )
    with inference(model):
        kept = torch.stack(
            [
                _log_probs(model, tokens, answers, num_loops, loop, predict, batch_size)
                for loop, predict in enumerate(_fitted(model, fit, num_loops, batch_size), 1)
            ]
        )
    times = resample(len(tokens), num_samples, seed)
    return _summarise(kept, times)


class _Prediction:
    """What is known of loop t + 1's update: from loop t's, and from other texts."""

    def __init__(self, before: Updates, after: Updates) -> None:
        self.others = after
        x, y = before.double(), after.double()
        self.factor = float((x * y).sum() / x.square().sum().clamp(min=torch.finfo(x.dtype).tiny))
        self.maps = [_ridge(x[:, place], y[:, place]) for place in range(x.shape[1])]

    def updates(self, before: Updates, numbers: list[int]) -> tuple[Updates, Updates, Updates]:
        """Another text's update, the scaled one, and the linear map's."""
        other = self.others[[number % len(self.others) for number in numbers]]
        places = zip(before.double().unbind(dim=1), self.maps, strict=True)
        linear = torch.stack([x @ matrix for x, matrix in places], dim=1)
        return other, self.factor * before, linear.to(before.dtype)


def _ridge(x: Float[Tensor, "N D"], y: Float[Tensor, "N D"]) -> Float[Tensor, "D D"]:
    """The map W for which x W is nearest to y, with a penalty of its size."""
    penalty = RIDGE * x.square().sum(dim=0).mean() + torch.finfo(x.dtype).tiny
    if len(x) < x.shape[1]:  # fewer texts than channels: the smaller of two equal systems
        gram = x @ x.T
        return x.T @ torch.linalg.solve(gram + penalty * torch.eye(len(x)).to(gram), y)
    gram = x.T @ x
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), x.T @ y)


def _fitted(
    model: RecurrentDepthLM, fit: Int[Tensor, "M T"], num_loops: int, batch_size: int
) -> Iterator[_Prediction]:
    """The predictions of loops 2, 3, ...; the texts advance together, one loop at a time."""
    states = [
        _start(model, part, seeds, num_loops) for part, seeds in batches(model, fit, batch_size)
    ]
    before: Tensor | None = None
    for _ in range(num_loops):
        old = torch.cat([state.h for _, state in states])
        states = [(ctx, advance(model, state, ctx)) for ctx, state in states]
        update = torch.cat([state.h for _, state in states]) - old
        if before is not None:
            yield _Prediction(before, update)
        before = update


def _log_probs(
    model: RecurrentDepthLM,
    tokens: Int[Tensor, "N T"],
    answers: Int[Tensor, "N"],
    num_loops: int,
    loop: int,
    prediction: _Prediction,
    batch_size: int,
) -> Float[Tensor, "A N"]:
    """Log-probabilities of the answers: unchanged, and with each replaced update of this loop."""
    found = []
    for part, numbers in batches(model, tokens, batch_size):
        ctx, state = _start(model, part, numbers, num_loops)
        before = state
        for _ in range(loop):
            before, state = state, advance(model, state, ctx)
        after = advance(model, state, ctx)
        updates = prediction.updates(state.h - before.h, numbers)
        arms = [after, *(replace(after, h=state.h + update) for update in updates)]
        wanted = answers[numbers].to(part.device)
        rows = []
        for arm in arms:
            for _ in range(num_loops - loop - 1):
                arm = advance(model, arm, ctx)
            logits = model.decode(readout(model, arm), ctx)[:, -1]
            rows.append(answer_log_prob(logits, wanted).cpu())
        found.append(torch.stack(rows))
    return torch.cat(found, dim=1)


def _start(
    model: RecurrentDepthLM, tokens: Int[Tensor, "B T"], seeds: list[int], num_loops: int
) -> tuple[ForwardContext, LoopState]:
    ctx = model.context(tokens, seeds=seeds)
    depths = [num_loops] * len(tokens)
    return ctx, start_loops(model, model.encode(tokens, ctx), ctx, depths)


def _summarise(kept: Float[Tensor, "M A N"], times: Float[Tensor, "S N"]) -> Novelty:
    """Novelty from log-probabilities per loop, arm (real, floor, scalar, ridge) and example."""
    real, floor, scalar, ridge = kept.mean(dim=-1).unbind(dim=1)
    sampled = torch.einsum("sn,man->sma", times, kept) / kept.shape[-1]
    harms = real - floor > MIN_HARM

    def share(arms: Float[Tensor, "... A"], arm: int) -> Float[Tensor, "..."]:
        above = (arms[..., arm] - arms[..., 1]) / (arms[..., 0] - arms[..., 1])
        return torch.where(harms, 1 - above, torch.nan)

    means = kept.mean(dim=-1)
    values = [tuple(map(defined, share(means, arm).tolist())) for arm in (2, 3)]
    intervals = [tuple(map(interval, share(sampled, arm).unbind(dim=1))) for arm in (2, 3)]
    return Novelty(
        log_prob=float(real[0]),
        floor=tuple(floor.tolist()),
        scalar=tuple(scalar.tolist()),
        ridge=tuple(ridge.tolist()),
        scalar_novelty=values[0],
        ridge_novelty=values[1],
        scalar_interval=intervals[0],
        ridge_interval=intervals[1],
    )
