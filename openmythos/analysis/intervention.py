"""Skip, swap and repeat loops: what the order and the number of loops do.

In a plainly tied loop these say nothing that the depth curve does not say: every loop is the same
map, so a swap changes nothing, and skipping any loop is running one loop less.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.model.inference import inference
from openmythos.model.loop import LoopState, advance, readout, start_loops
from openmythos.model.recurrent import RecurrentDepthLM

Schedule = tuple[int, ...]  # the loops that are run, in this order, by their numbers from 0


def skip(num_loops: int, loop: int) -> Schedule:
    """All loops but one; those after it keep their numbers."""
    return (*range(loop), *range(loop + 1, num_loops))


def repeat(num_loops: int, loop: int) -> Schedule:
    """All loops, and one of them twice."""
    return (*range(loop + 1), *range(loop, num_loops))


def swap(num_loops: int, first: int, second: int) -> Schedule:
    """All loops, two of them exchanged."""
    order = list(range(num_loops))
    order[first], order[second] = second, first
    return tuple(order)


def at_loop(state: LoopState, loop: int) -> LoopState:
    """The state, whose next loop is this one for all rows."""
    return replace(
        state, loop_idx=torch.full_like(state.loop_idx, loop), loops=(loop,) * len(state.loops)
    )


def answer_logits(
    model: RecurrentDepthLM,
    tokens: Int[Tensor, "N T"],
    schedule: Sequence[int],
    *,
    batch_size: int = 256,
) -> Float[Tensor, "N V"]:
    """The logits at the last tokens after running the loops of a schedule.

    The examples' numbers are the seeds of random initial states.

    Raises:
        ValueError: The schedule is empty, or ``batch_size`` is below 1.
    """
    if not schedule:
        raise ValueError("the schedule has no loop; it must have at least one")
    found = []
    with inference(model):
        for part, seeds in batches(model, tokens, batch_size):
            ctx = model.context(part, seeds=seeds)
            state = start_loops(model, model.encode(part, ctx), ctx, [len(schedule)] * len(part))
            for loop in schedule:
                state = advance(model, at_loop(state, loop), ctx)
            found.append(model.decode(readout(model, state), ctx)[:, -1].cpu())
    return torch.cat(found)


def batches(
    model: RecurrentDepthLM, tokens: Int[Tensor, "_ T"], size: int
) -> Iterator[tuple[Int[Tensor, "_ T"], list[int]]]:
    """Some rows at a time on the model's device, and their numbers.

    Raises:
        ValueError: ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; it must be at least 1")
    device = next(model.parameters()).device
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        yield part.to(device), list(range(start, start + len(part)))


def answer_log_prob(logits: Float[Tensor, "N V"], answers: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The log-probability of each answer, in nats."""
    return logits.double().log_softmax(dim=-1).gather(1, answers[:, None])[:, 0]


@dataclass(frozen=True, kw_only=True)
class Interventions:
    """Mean log-probability of the answers, in nats, after changing which loops are run.

    Attributes:
        unchanged: Without a change.
        skipped: Without each loop.
        repeated: With each loop twice.
        swapped: With each loop and the next exchanged.
    """

    unchanged: float
    skipped: tuple[float, ...]
    repeated: tuple[float, ...]
    swapped: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return asdict(self)


def intervene(
    model: RecurrentDepthLM,
    tokens: Int[Tensor, "N T"],
    answers: Int[Tensor, "N"],
    num_loops: int,
    *,
    batch_size: int = 256,
) -> Interventions:
    """Skip, repeat and swap every loop in turn.

    Raises:
        ValueError: ``num_loops`` is below 2, so that no loop can be left out.
    """
    if num_loops < 2:
        raise ValueError(f"num_loops is {num_loops}; to skip and swap loops give at least 2")

    def measure(schedule: Schedule) -> float:
        logits = answer_logits(model, tokens, schedule, batch_size=batch_size)
        return float(answer_log_prob(logits, answers).mean())

    return Interventions(
        unchanged=measure(tuple(range(num_loops))),
        skipped=tuple(measure(skip(num_loops, loop)) for loop in range(num_loops)),
        repeated=tuple(measure(repeat(num_loops, loop)) for loop in range(num_loops)),
        swapped=tuple(measure(swap(num_loops, loop, loop + 1)) for loop in range(num_loops - 1)),
    )
