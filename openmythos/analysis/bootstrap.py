"""Intervals: the examples are drawn again, with replacement, and the numbers computed again."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Interval = tuple[float, float]
LEVEL = 0.95


def resample(num_examples: int, num_samples: int, seed: int) -> Float[Tensor, "S N"]:
    """How often each example was drawn in each sample of as many examples."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_examples, (num_samples, num_examples), generator=draw)
    times = torch.zeros(num_samples, num_examples, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(times))


def interval(values: Float[Tensor, "S"]) -> Interval | None:
    """The central 95 % of the values, of those that are defined; None if none is."""
    known = values[~values.isnan()]
    if not len(known):
        return None
    outside = (1 - LEVEL) / 2
    low, high = known.quantile(known.new_tensor([outside, 1 - outside])).tolist()
    return low, high


def defined(value: float) -> float | None:
    """The number; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
