"""The same choice of a learning rate for every arm, from runs on a seed that is not used again."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.run_store import Result, Results, Run

TUNING_SEED = 99


@dataclass(frozen=True)
class Tuned:
    """The tuning runs of an arm known so far, and the rate once all of them have ended.

    Attributes:
        runs: Three, and a fourth if the best rate is at an edge.
        rate: The best; None while a run is missing, or if every run is lost.
        scores: By rate, of the runs that have ended; minus infinity for a lost one.
    """

    runs: list[Run]
    rate: float | None
    scores: Mapping[float, float]

    def then(self, arm: str, settings: Mapping[str, Any], seeds: Sequence[int]) -> list[Run]:
        """The tuning runs and, once the rate is chosen, the arm's runs with it, one per seed."""
        if self.rate is None:
            return self.runs
        chosen = {**settings, "rate": self.rate}
        return [*self.runs, *(Run(arm, seed, chosen) for seed in seeds)]


def tuned(
    done: Results,
    arm: str,
    settings: Mapping[str, Any],
    rates: Sequence[float],
    score: Callable[[Result], float],
) -> Tuned:
    """Choose the arm's rate: the best of three, or of four if the best of three is at an edge.

    Among equal scores the rate nearest to the middle one is chosen, then the lower.

    Args:
        done: The results so far.
        arm: Its name.
        settings: Its settings but the rate, which becomes ``settings["rate"]``.
        rates: Three, each the same factor above the one before.
        score: Of a completed run; higher is better.
    """
    tried = sorted(rates)
    if len(tried) != 3:
        raise ValueError(f"the rates are {tried}; give three")
    runs, scores = _ended(done, arm, settings, tried, score)
    if len(scores) == 3 and max(scores.values()) > -math.inf:
        best = _best(scores, middle=tried[1])
        if best == tried[0]:
            tried.append(_neat(tried[0] * tried[0] / tried[1]))
        elif best == tried[2]:
            tried.append(_neat(tried[2] * tried[2] / tried[1]))
        runs, scores = _ended(done, arm, settings, tried, score)
    if len(scores) < len(tried) or max(scores.values()) == -math.inf:
        return Tuned(runs, None, scores)
    return Tuned(runs, _best(scores, middle=tried[1]), scores)


def _neat(rate: float) -> float:
    return float(f"{rate:.6g}")


def _ended(
    done: Results,
    arm: str,
    settings: Mapping[str, Any],
    rates: Sequence[float],
    score: Callable[[Result], float],
) -> tuple[list[Run], dict[float, float]]:
    scores = {}
    runs = [Run(arm, TUNING_SEED, {**settings, "rate": rate}, tuning=True) for rate in rates]
    for rate, run in zip(rates, runs, strict=True):
        result = done.find(run)
        if result is not None:
            scores[rate] = score(result) if result.lost is None else -math.inf
    return runs, scores


def _best(scores: Mapping[float, float], middle: float) -> float:
    return max(scores, key=lambda rate: (scores[rate], -abs(math.log(rate / middle)), -rate))
