"""Intervals over seeds, and when a gap between two arms is a result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The 97.5 % point of Student's t by degrees of freedom; above the last, that of the normal.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval.

    Attributes:
        mean: The number.
        low: Lower end; minus infinity if one value alone says nothing.
        high: Upper end.
        deviation: Standard deviation over seeds (n - 1 in the denominator); 0 for one value.
        count: Number of values.
    """

    mean: float
    low: float
    high: float
    deviation: float
    count: int

    def __str__(self) -> str:
        ends = f"{self.low:.3f} to {self.high:.3f}" if self.count > 1 else "one value"
        return f"{self.mean:.3f} ({ends})"


@dataclass(frozen=True)
class Gap:
    """The difference of two arms' means.

    Attributes:
        difference: Mean of the first minus mean of the second, with its interval.
        deviation: The seed deviation of the two arms: root of their mean variance.
        is_result: Whether the difference is at least two seed deviations.
    """

    difference: Interval
    deviation: float
    is_result: bool


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's interval over seeds.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 0.0, 1)
    deviation = float(np.std(values, ddof=1))
    half = _t(n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, deviation, n)


def gap(first: Sequence[float], second: Sequence[float]) -> Gap:
    """How far the first arm is above the second, over the same seeds or over different ones.

    A difference of less than two seed deviations, or with fewer than two seeds in an arm, is no
    result.
    """
    a, b = t_interval(first), t_interval(second)
    difference = a.mean - b.mean
    deviation = math.sqrt((a.deviation**2 + b.deviation**2) / 2)
    count = min(a.count, b.count)
    if count < 2:
        interval = Interval(difference, -math.inf, math.inf, deviation, count)
        return Gap(interval, deviation, is_result=False)
    error = math.sqrt(a.deviation**2 / a.count + b.deviation**2 / b.count)
    half = _t(count - 1) * error
    interval = Interval(difference, difference - half, difference + half, deviation, count)
    return Gap(interval, deviation, is_result=difference != 0 and abs(difference) >= 2 * deviation)


def _t(freedom: int) -> float:
    return T_975[freedom - 1] if freedom <= len(T_975) else 1.96
