"""Laws of the loss of looped models, fitted to runs: constants, intervals, the optimum. No torch.

Every law is a constant and a sum of terms whose factors are linear once the exponents are given
(N = N_once + T N_loop multiply-adds with weights per token, D tokens, t loops at test time):

    unrolled    L = E + A N^-a + B D^-b
    iso_depth   L = E + A (N_once + T^phi N_loop)^-a + B D^-b
    test_time   L = E + Z exp(-z t)
    unified     L = E + A N^-a + B D^-b + Z exp(-z t / T)

So exponents are searched on a grid, then polished by Gauss-Newton steps on what the best factors
leave (variable projection), for many sets of losses at once: the bootstrap of residuals is one fit.
What the runs do not determine is refused, by the name of the constant.

Source: Parcae (arXiv 2604.12946), tables 11 and 12, for all but the second; arXiv 2604.21106 for
    the second, where phi is what a loop is worth in layers; Golub and Pereyra 1973.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from openmythos.config import ModelConfig, counts
from openmythos.config.schema import require

Runs = Mapping[str, Array]  # columns: once, loop, num_loops, tokens, test_loops, loss

STEPS = 60  # of the polishing; it ends earlier where nothing improves
SMALLEST_STEP = 1e-9  # of an exponent
WORST_CONDITION = 1e9  # of the derivatives, each of unit length; above, constants trade freely
LEAST_SIGNAL = 2.0  # an exponent must be this many standard errors from 0
WIDEST_PHI = 0.25  # standard error: phi lies between 0 and about 1
CLOSEST = 0.999  # correlation of log sizes; above, two terms cannot be told apart
INTERVAL = 0.9
LOST = 0.1  # share of a bootstrap's fits that may find no positive factors


def unrolled_params(runs: Runs, phi: Any = 1.0) -> Array:
    """N_once + T^phi N_loop of each run."""
    return np.asarray(runs["once"] + runs["num_loops"] ** phi * runs["loop"])


def _powers(exponents: Array, runs: Runs, phi: Any = 1.0) -> list[Array]:
    """The terms of model size and of data, without factors: [G N] each."""
    sizes = np.log(unrolled_params(runs, phi)), np.log(runs["tokens"])
    return [np.exp(-exponents[:, i, None] * size) for i, size in enumerate(sizes)]


def _unrolled(exponents: Array, runs: Runs) -> list[Array]:
    return _powers(exponents, runs)


def _iso_depth(exponents: Array, runs: Runs) -> list[Array]:
    return _powers(exponents, runs, exponents[:, 2, None])


def _test_time(exponents: Array, runs: Runs) -> list[Array]:
    return [np.exp(-exponents[:, :1] * runs["test_loops"])]


def _unified(exponents: Array, runs: Runs) -> list[Array]:
    share = runs["test_loops"] / runs["num_loops"]
    return [*_powers(exponents, runs), np.exp(-exponents[:, 2:3] * share)]


@dataclass(frozen=True)
class Law:
    """A law.

    Args:
        formula: As a reader writes it.
        factors: Names of the constant and of each term's factor.
        exponents: Names, each with the range that is searched.
        columns: What must be known of each run, and how many different values it takes at least.
        terms: The terms for exponents [G K], without factors: [G N] each.
    """

    formula: str
    factors: tuple[str, ...]
    exponents: Mapping[str, tuple[float, float]]
    columns: Mapping[str, int]
    terms: Callable[[Array, Runs], list[Array]]

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of all constants, in the order of a fit's values."""
        return (*self.factors, *self.exponents)


SIZE, DECAY, WORTH = (0.02, 2.0), (0.01, 8.0), (-0.5, 2.0)
LOOPED = {"once": 1, "loop": 1, "num_loops": 1, "tokens": 3}
LAWS = {
    "unrolled": Law(
        "E + A N^-a + B D^-b", ("E", "A", "B"), {"a": SIZE, "b": SIZE}, LOOPED, _unrolled
    ),
    "iso_depth": Law(
        "E + A (N_once + T^phi N_loop)^-a + B D^-b",
        ("E", "A", "B"),
        {"a": SIZE, "b": SIZE, "phi": WORTH},
        LOOPED | {"num_loops": 2},
        _iso_depth,
    ),
    "test_time": Law("E + Z exp(-z t)", ("E", "Z"), {"z": DECAY}, {"test_loops": 3}, _test_time),
    "unified": Law(
        "E + A N^-a + B D^-b + Z exp(-z t/T)",
        ("E", "A", "B", "Z"),
        {"a": SIZE, "b": SIZE, "z": DECAY},
        LOOPED | {"test_loops": 3},
        _unified,
    ),
}


class UnidentifiedError(ValueError):
    """The runs do not determine a constant of the law."""


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Args:
        law: Its name in ``LAWS``.
        values: The constants, by name.
        intervals: Of each constant, by bootstrap; empty if none was asked for.
        deviation: Standard deviation of the losses around the law; 0 without a spare run.
        num_runs: Losses that were fitted.
    """

    law: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    deviation: float
    num_runs: int

    def predict(self, runs: Runs) -> Array:
        """The losses that the law gives for runs."""
        law = LAWS[self.law]
        exponents = np.array([[self.values[name] for name in law.exponents]])
        constant, *factors = (self.values[name] for name in law.factors)
        terms = law.terms(exponents, runs)
        return np.asarray(
            constant + sum(f * term[0] for f, term in zip(factors, terms, strict=True))
        )


def fit(law: str, runs: Runs, *, resamples: int = 0, seed: int = 0) -> Fit:
    """Fit a law to the losses of runs, by least squares.

    Args:
        law: A name in ``LAWS``.
        runs: Columns of equal length; ``loss`` and those that the law needs. Of losses at several
            ``test_loops``, the laws of training see those nearest to the run's ``num_loops``.
        resamples: Bootstrap samples of the residuals for the intervals; 0: no intervals.
        seed: Of the bootstrap.

    Raises:
        UnidentifiedError: The runs do not determine a constant; names it.
        ValueError: Columns are missing.
    """
    require(law in LAWS, "law", law, "one of " + ", ".join(LAWS))
    form, runs = LAWS[law], used_by(law, runs)
    _check_columns(law, form, runs)
    losses = np.asarray(runs["loss"], dtype=np.float64)
    exponents, factors, rest = _best(form, runs, losses[None])
    if not np.isfinite(rest[0]):
        raise UnidentifiedError(
            f"{law}: no exponents in the range that is searched fit with positive factors"
        )
    values = np.concatenate([factors[0], exponents[0]])
    spare = len(losses) - len(values)
    deviation = float(np.sqrt(rest[0] / spare)) if spare else 0.0
    _check_identified(law, form, runs, values, deviation)
    named = dict(zip(form.constants, values.tolist(), strict=True))
    found = Fit(law, named, {}, deviation, len(losses))
    if not resamples or not spare:
        return found
    fitted = found.predict(runs)
    left = (losses - fitted) * np.sqrt(len(losses) / spare)
    drawn = np.random.default_rng(seed).choice(left, (resamples, len(left)))
    exponents, factors, rest = _best(form, runs, fitted + drawn)
    kept = np.isfinite(rest)
    if kept.mean() < 1 - LOST:
        raise UnidentifiedError(
            f"{law}: {1 - kept.mean():.0%} of the bootstrap samples have no fit with positive "
            "factors; add runs of other sizes"
        )
    samples = np.concatenate([factors, exponents], 1)[kept]
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0).tolist()
    return Fit(
        law,
        named,
        dict(zip(form.constants, zip(low, high, strict=True), strict=True)),
        deviation,
        len(losses),
    )


# --- least squares for many sets of losses --------------------------------------------------------


def _basis(form: Law, exponents: Array, runs: Runs) -> tuple[Array, Array]:
    """The constant and the terms [G N 1+m], each divided by its largest value, and these [G m]."""
    terms = np.stack(form.terms(exponents, runs), -1)
    scales = np.maximum(terms.max(axis=1), 1e-300)  # a fast decay may be 0 at every run
    ones = np.ones((*terms.shape[:2], 1))
    return np.concatenate([ones, terms / scales[:, None]], -1), scales


def _grid(form: Law) -> Array:
    """Exponents that are tried first, evenly spaced; decays and powers by their logarithm."""
    number = 24 if len(form.exponents) < 3 else 12
    axes = [
        np.geomspace(low, high, number) if low > 0 else np.linspace(low, high, number)
        for low, high in form.exponents.values()
    ]
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], -1)


def _best(
    form: Law, runs: Runs, losses: Float[Array, "R N"]
) -> tuple[Float[Array, "R K"], Float[Array, "R M"], Float[Array, " R"]]:
    """The best exponents, factors and squared rest of each set of losses; inf: nothing fits."""
    grid = _grid(form)
    basis, _ = _basis(form, grid, runs)
    q, r = np.linalg.qr(basis)
    across = q.swapaxes(1, 2)
    mean = losses.mean(axis=1)  # apart, so that what is left of losses near each other is exact
    centred = losses - mean[:, None]
    inside = across @ centred.T  # [G M R]
    rest = (centred**2).sum(1) - (inside**2).sum(1)
    inside += (across @ np.ones((losses.shape[1], 1))) * mean
    factors = (np.linalg.inv(_regular(r)) @ inside).swapaxes(1, 2)
    rest = np.where((factors > 0).all(-1), rest, np.inf)
    start = rest.argmin(0)
    found = np.isfinite(rest.min(0))
    return _polish(form, runs, losses, grid[start], found)


def _regular(r: Array) -> Array:
    """Triangular factors without zeros on the diagonal, which stand for equal columns."""
    tiny = np.abs(np.diagonal(r, axis1=-2, axis2=-1)) < 1e-13
    return r + tiny[..., None] * np.eye(r.shape[-1])


def _project(
    form: Law, runs: Runs, losses: Array, exponents: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """For each set its own exponents: scales, q, factors, what is left, its square or inf."""
    basis, scales = _basis(form, exponents, runs)
    q, r = np.linalg.qr(basis)
    inside = np.einsum("rnm,rn->rm", q, losses)
    factors = np.linalg.solve(_regular(r), inside[..., None])[..., 0]
    left = losses - np.einsum("rnm,rm->rn", q, inside)
    left -= np.einsum("rnm,rm->rn", q, np.einsum("rnm,rn->rm", q, left))  # rounding, once more
    square = np.where((factors > 0).all(-1), (left**2).sum(-1), np.inf)
    return scales, q, factors, left, square


def _slopes(form: Law, runs: Runs, exponents: Array, factors: Array, scales: Array) -> Array:
    """Derivatives [R N K] of the fitted losses by the exponents, at given factors."""
    slopes = []
    for k in range(exponents.shape[1]):
        step = np.zeros_like(exponents)
        step[:, k] = 1e-5
        ends = [np.stack(form.terms(exponents + sign * step, runs), -1) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-5 / scales[:, None]
        slopes.append(np.einsum("rnm,rm->rn", slope, factors[:, 1:]))
    return np.stack(slopes, -1)


def _polish(
    form: Law, runs: Runs, losses: Array, exponents: Array, found: Array
) -> tuple[Array, Array, Array]:
    """Damped Gauss-Newton steps from given exponents; worse ones are not taken."""
    low, high = (np.array(ends) for ends in zip(*form.exponents.values(), strict=True))
    damping = np.full(len(losses), 1e-3)
    scales, q, factors, left, square = _project(form, runs, losses, exponents)
    for _ in range(STEPS):
        slopes = _slopes(form, runs, exponents, factors, scales)
        slopes -= np.einsum("rnm,rmk->rnk", q, np.einsum("rnm,rnk->rmk", q, slopes))
        gram = np.einsum("rnk,rnl->rkl", slopes, slopes)
        diagonal = np.diagonal(gram, axis1=1, axis2=2) + 1e-300
        damped = gram + damping[:, None, None] * np.eye(gram.shape[1]) * diagonal[:, None]
        toward = np.einsum("rnk,rn->rk", slopes, left)
        step = np.linalg.solve(damped, toward[..., None])[..., 0]
        tried = np.clip(exponents + step, low, high)
        new = _project(form, runs, losses, tried)
        better = new[-1] < square
        damping = np.where(better, damping / 5, np.minimum(damping * 4, 1e12))
        moving = np.abs(tried - exponents).max() > SMALLEST_STEP
        pick = better.reshape(-1, 1)
        exponents = np.where(pick, tried, exponents)
        scales, factors, left = (
            np.where(pick, ours, theirs)
            for ours, theirs in zip((new[0], new[2], new[3]), (scales, factors, left), strict=True)
        )
        q = np.where(pick[..., None], new[1], q)
        square = np.where(better, new[-1], square)
        if not moving:
            break
    unscaled = np.concatenate([factors[:, :1], factors[:, 1:] / scales], 1)
    return exponents, unscaled, np.where(found, square, np.inf)


# --- what runs can tell ---------------------------------------------------------------------------


def _models(runs: Runs) -> Array:
    """A number for each loss: that of the trained model it belongs to."""
    known = [np.asarray(runs[name]) for name in LOOPED if name in runs]
    if not known:
        return np.zeros(len(runs["loss"]), dtype=np.int64)
    return np.unique(np.stack(known, 1), axis=0, return_inverse=True)[1].ravel()


def used_by(law: str, runs: Runs) -> Runs:
    """The runs that a law sees.

    Those of training see, of each model, the losses nearest to its number of loops in training.
    """
    if "test_loops" in LAWS[law].columns or not {"test_loops", "num_loops"} <= runs.keys():
        return runs
    models, away = _models(runs), np.abs(runs["test_loops"] - runs["num_loops"])
    nearest = np.full(models.max() + 1, np.inf)
    np.minimum.at(nearest, models, away)
    kept = away == nearest[models]
    return {name: np.asarray(column)[kept] for name, column in runs.items()}


def _check_columns(law: str, form: Law, runs: Runs) -> None:
    missing = [name for name in ("loss", *form.columns) if name not in runs]
    if missing:
        raise UnidentifiedError(f"{law}: the runs have no {', '.join(missing)}")
    size = len(runs["loss"])
    if size < len(form.constants):
        raise UnidentifiedError(
            f"{law}: {size} losses cannot determine {len(form.constants)} constants "
            f"({', '.join(form.constants)})"
        )
    if "once" not in form.columns and (number := len(np.unique(_models(runs)))) > 1:
        raise UnidentifiedError(
            f"{law}: these are losses of {number} models, and it is a law of one; give one run"
        )
    varied = {name: (np.asarray(runs[name]), least) for name, least in form.columns.items()}
    if "once" in form.columns:
        varied["model size"] = (unrolled_params(runs), 3)
    for name, (column, least) in varied.items():
        number = len(np.unique(column))
        if number < least:
            raise UnidentifiedError(
                f"{law}: the runs have {number} different {name}; at least {least} are needed"
            )
    if "once" in form.columns:
        sizes = np.log(unrolled_params(runs)), np.log(runs["tokens"])
        related = float(np.corrcoef(*sizes)[0, 1])
        if abs(related) > CLOSEST:
            raise UnidentifiedError(
                f"{law}: model size and tokens go together (correlation {related:+.4f} of their "
                "logarithms), so A N^-a and B D^-b cannot be told apart; vary one alone"
            )


def _check_identified(law: str, form: Law, runs: Runs, values: Array, deviation: float) -> None:
    """Refuse constants that the runs leave open, from the derivatives at the fit."""
    number = len(form.factors)
    exponents, bounds = values[None, number:], form.exponents.items()
    basis, scales = _basis(form, exponents, runs)
    factors = values[None, :number] * np.concatenate([np.ones((1, 1)), scales], 1)
    slopes = _slopes(form, runs, exponents, factors, scales)
    table = np.concatenate([basis, slopes], -1)[0]
    lengths = np.linalg.norm(table, axis=0) + 1e-300
    _, sizes, directions = np.linalg.svd(table / lengths, full_matrices=False)
    if sizes[0] > WORST_CONDITION * sizes[-1]:
        name = form.constants[int(np.abs(directions[-1]).argmax())]
        raise UnidentifiedError(f"{law}: the runs do not determine {name}: others make up for it")
    errors = deviation * np.sqrt(((directions / sizes[:, None]) ** 2).sum(0)) / lengths
    for place, (name, (low, high)) in enumerate(bounds, start=number):
        value, error = values[place], errors[place]
        if not low * (1 + 1e-6) < value < high * (1 - 1e-6) and name != "phi":
            raise UnidentifiedError(
                f"{law}: {name} runs to the end of what is searched ({value:.3g} in {low}..{high})"
            )
        if error > (WIDEST_PHI if name == "phi" else value / LEAST_SIGNAL):
            raise UnidentifiedError(
                f"{law}: the runs do not determine {name}: {value:.3g} with a standard error of "
                f"{error:.2g}"
            )


# --- the optimum ----------------------------------------------------------------------------------

# Training FLOPs per token, from N_once, N_loop and mean loops T, by how gradients are cut.
FLOPS: Mapping[str, Callable[[float, float, Array], Array]] = {
    "half of the loops with gradient: 6 N_once + 4 T N_loop": lambda once, loop, loops: (
        6 * once + 4 * loops * loop
    ),
    "every loop with gradient: 6 (N_once + T N_loop)": lambda once, loop, loops: (
        6 * (once + loops * loop)
    ),
}


@dataclass(frozen=True)
class Optimum:
    """The best number of loops and of tokens for each compute, and how they grow with it.

    Args:
        convention: How FLOPs are counted.
        compute: FLOPs.
        loops: T*, not rounded.
        tokens: D*.
        loops_exponent: Of T* ~ C^x.
        tokens_exponent: Of D* ~ C^y. The sum is not 1: the parts that run once are a fixed cost.
    """

    convention: str
    compute: Array
    loops: Array
    tokens: Array
    loops_exponent: float
    tokens_exponent: float


def optimum(
    found: Fit, *, once: float, loop: float, compute: tuple[float, float], convention: str
) -> Optimum:
    """The law's own optimum for a model, between two budgets of compute in FLOPs."""
    budgets = np.geomspace(*compute, 9)
    loops = np.geomspace(0.25, 256, 8001)
    tokens = budgets[:, None] / FLOPS[convention](once, loop, loops)
    grid = np.broadcast_to(loops, tokens.shape).ravel()
    same = {"once": np.full(grid.shape, once), "loop": np.full(grid.shape, loop)}
    runs = {**same, "num_loops": grid, "tokens": tokens.ravel()}
    best = found.predict(runs).reshape(tokens.shape).argmin(1)
    chosen, trained = loops[best], tokens[np.arange(len(budgets)), best]
    exponents = [
        float(np.polyfit(np.log(budgets), np.log(each), 1)[0]) for each in (chosen, trained)
    ]
    return Optimum(convention, budgets, chosen, trained, *exponents)


# --- published laws -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published law of ``unrolled`` and the runs that it was fitted to.

    Source: Parcae (arXiv 2604.12946), table 11; its grid of compute and loops, table 6.
    """

    preset: str
    values: Mapping[str, float]
    compute: tuple[float, ...]
    loops: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    loops_exponent: float = 0.40
    tokens_exponent: float = 0.78


PARCAE = {
    "parcae-140m": Published(
        "parcae-140m",
        {"E": 2.662, "A": 522_733, "a": 0.771, "B": 25_420, "b": 0.525},
        (1e18, 2e18, 4e18, 8e18, 16e18, 64e18),
    ),
    "parcae-370m": Published(
        "parcae-370m",
        {"E": 2.439, "A": 832_134, "a": 0.775, "B": 6387, "b": 0.448},
        (32e18, 64e18, 128e18),
    ),
}


def sizes(config: ModelConfig) -> tuple[int, int]:
    """N_once and N_loop: multiply-adds with weights per token, the head included, tables not."""
    parts = counts.parts(config)
    once = sum(part.weights.macs for part in parts if not part.looped)
    return once, sum(part.weights.macs for part in parts if part.looped)


def simulate(
    published: Published, config: ModelConfig, *, noise: float = 0.0, seed: int = 0
) -> dict[str, Array]:
    """The runs behind a published law, with the losses that it gives them, and normal noise."""
    once, loop = sizes(config)
    compute, loops = (
        grid.ravel() for grid in np.meshgrid(published.compute, published.loops, indexing="ij")
    )
    with_grad = (loops + 1) // 2
    flops = 6 * once + loop * (6 * with_grad + 2 * (loops - with_grad))
    runs = {
        "once": np.full(compute.shape, float(once)),
        "loop": np.full(compute.shape, float(loop)),
        "num_loops": loops.astype(float),
        "tokens": compute / flops,
    }
    law = Fit("unrolled", published.values, {}, noise, len(compute))
    drawn = np.random.default_rng(seed).normal(0, noise, compute.shape) if noise else 0.0
    return {**runs, "loss": law.predict(runs) + drawn}
