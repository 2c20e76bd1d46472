"""Optimal recurrence by budget: a parabola per budget, a line through their minima."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """``value = scale * budget ** exponent``, fitted to logarithms.

    Attributes:
        exponent: The slope.
        fit: R squared of the line; 1 where all points lie on it.
    """

    exponent: float
    fit: float


def best_recurrence(losses: Mapping[int, float]) -> float | None:
    """Where a parabola in the logarithm of the recurrence is lowest; None: not between its ends."""
    loops = sorted(losses)
    if len(loops) < 3:
        return None
    logs = np.log2(np.array(loops, dtype=np.float64))
    square, slope, _ = np.polyfit(logs, np.array([losses[n] for n in loops]), 2)
    if square <= 0:
        return None
    lowest = -slope / (2 * square)
    inside = logs[0] < lowest < logs[-1]
    return float(2.0**lowest) if inside else None


def power_law(budgets: Sequence[float], values: Sequence[float]) -> PowerLaw | None:
    """The line through logarithms; None with fewer than three points."""
    if len(budgets) < 3:
        return None
    x, y = np.log(np.array(budgets)), np.log(np.array(values))
    slope, start = np.polyfit(x, y, 1)
    rest, whole = float(((y - slope * x - start) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    fit = 1.0 if math.isclose(rest, 0, abs_tol=1e-18) else 1 - rest / max(whole, 1e-18)
    return PowerLaw(float(slope), fit)
