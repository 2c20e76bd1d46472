"""Two laws of a falling curve, fitted to losses by number of loops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RATES = np.geomspace(0.02, 50.0, 2001)  # that are tried; the other two numbers are linear


@dataclass(frozen=True)
class Fit:
    """``limit + size * law(loops, rate)``; ``residual`` is the largest one, without its sign."""

    limit: float
    size: float
    rate: float
    residual: float


def exponential(loops: np.ndarray, rate: float) -> np.ndarray:
    """exp(-rate (n - 1)): every loop closes the same share of what is left."""
    return np.exp(-rate * (loops - 1.0))


def power(loops: np.ndarray, rate: float) -> np.ndarray:
    """n^-rate: every doubling of the loops closes the same share of what is left."""
    return loops**-rate


def fit(
    law: Callable[[np.ndarray, float], np.ndarray],
    loops: Sequence[int],
    losses: Sequence[float],
) -> Fit:
    """The least squares of a law.

    Raises:
        ValueError: There are fewer than four points: three numbers would fit any three.
    """
    if len(loops) < 4:
        raise ValueError(f"{len(loops)} points; three numbers are fitted, so give at least four")
    x, y = np.asarray(loops, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    best: tuple[float, Fit] | None = None
    for rate in RATES.tolist():
        columns = np.stack([np.ones_like(x), law(x, rate)], axis=1)
        (limit, size), *_ = np.linalg.lstsq(columns, y, rcond=None)
        off = y - columns @ np.array([limit, size])
        squares = float(off @ off)
        if best is None or squares < best[0]:
            found = Fit(float(limit), float(size), rate, float(np.abs(off).max()))
            best = (squares, found)
    assert best is not None
    return best[1]


def values(law: Callable[[np.ndarray, float], np.ndarray], found: Fit, loops: Sequence[float]):
    """The fitted curve at these loops."""
    return found.limit + found.size * law(np.asarray(loops, dtype=np.float64), found.rate)


LAWS = (exponential, power)
