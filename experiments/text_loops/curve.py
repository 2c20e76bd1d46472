"""Two laws of a falling curve, fitted to losses by number of loops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Law = Callable[[np.ndarray, float], np.ndarray]
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
    law: Law,
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
    shapes = np.stack([law(x, rate) for rate in RATES.tolist()])
    shapes_off = shapes - shapes.mean(axis=1, keepdims=True)
    sizes = shapes_off @ (y - y.mean()) / np.maximum((shapes_off**2).sum(axis=1), 1e-300)
    limits = y.mean() - sizes * shapes.mean(axis=1)
    off = np.abs(y - limits[:, None] - sizes[:, None] * shapes)
    best = int((off**2).sum(axis=1).argmin())
    return Fit(float(limits[best]), float(sizes[best]), float(RATES[best]), float(off[best].max()))


def values(law: Law, found: Fit, loops: Sequence[float]) -> np.ndarray:
    """The fitted curve at these loops."""
    return found.limit + found.size * law(np.asarray(loops, dtype=np.float64), found.rate)


LAWS = (exponential, power)
