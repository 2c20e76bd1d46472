"""What halting heads and exit rules do on walks: loops taken and right answers, from one pass.

All loops are run once and every rule is followed afterwards. That equals decoding with the rule:
the tokens before the last are read with all loops in both. (A coda would differ: in decoding it
sees those tokens after all their loops, whatever the last one's depth. The arms have none.)
"""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from experiments.halting.arm import TRAINED_HOPS, Arm
from openmythos.config import ACTConfig, PonderNetConfig
from openmythos.config.schema import to_dict
from openmythos.data.synthetic import Walks
from openmythos.demo.walks import rank_correlation
from openmythos.eval.calibration import Observed
from openmythos.model.exit import (
    AccelerationExit,
    ArgmaxStableExit,
    CumulativeThreshold,
    EntropyKLExit,
    KLExit,
    LatentDifferenceExit,
    Rule,
)
from openmythos.model.inference import inference
from openmythos.model.loop import readout, start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM

TEST, CALIBRATION = 1, 2  # seeds of held-out walks: those that are reported, those that choose
RULES: tuple[Rule, ...] = (
    *(EntropyKLExit(kl=x, entropy=y) for x, y in ((0.1, 1.0), (0.01, 1.0), (0.01, 0.1))),
    *(KLExit(threshold=x) for x in (0.1, 0.01, 5e-4)),
    *(LatentDifferenceExit(threshold=x) for x in (0.03, 0.1, 0.3, 0.5)),
    *(AccelerationExit(threshold=x, patience=1) for x in (0.1, 0.3, 0.5)),
    *(ArgmaxStableExit(patience=x) for x in (1, 2, 3)),
)


class Watched(NamedTuple):
    """The last token of some walks at every loop, and the right answers."""

    seen: Observed
    answers: Int[Tensor, " N"]

    def up_to(self, most: int) -> "Watched":
        """The same with at most so many loops."""
        start, h, logits, mass = self.seen
        cut = Observed(start, h[:most], logits[:most], None if mass is None else mass[:most])
        return Watched(cut, self.answers)

    def predictions(self) -> Int[Tensor, "L N"]:
        """The most likely token if the walk ended after each loop."""
        return torch.stack([logits.argmax(dim=-1) for logits in self.seen.logits])

    def accuracy(self) -> list[float]:
        """By number of loops."""
        right = self.predictions() == self.answers
        return [float(share) for share in right.double().mean(dim=1)]

    def settled(self) -> Int[Tensor, " N"]:
        """The first loop from which the prediction stays what it is after the last."""
        predictions = self.predictions()
        same = (predictions == predictions[-1]).flip(0).cumprod(dim=0).sum(dim=0)
        return len(predictions) + 1 - same

    def follow(self, rule: Rule) -> dict[str, Any]:
        """Loops taken under the rule, how many walks took each number, and right answers.

        ``wasted`` is the share of the loops that came after the prediction had settled,
        ``settled_early`` and ``halted_of_them`` count the walks that settled in the first half of
        the loops, and those of them that the rule stopped before the last.
        """
        taken, settled, most = self.seen.loops(rule), self.settled(), len(self.seen.h)
        given = self.predictions()[taken - 1, torch.arange(len(taken))]
        early = settled <= most // 2
        return {
            "loops": torch.bincount(taken, minlength=most + 1)[1:].tolist(),
            "right": float((given == self.answers).double().mean()),
            "wasted": float((taken - settled).clamp(min=0).sum() / taken.sum()),
            "settled_early": int(early.sum()),
            "halted_of_them": int((early & (taken < most)).sum()),
        }


def watch(
    model: RecurrentDepthLM, walks: Walks, num_hops: int, count: int, seed: int, most: int
) -> Watched:
    """Run all loops on held-out walks."""
    batch = walks.held_out_batch(num_hops, count, seed)
    h, logits, mass = [], [], []
    with inference(model):
        ctx = model.context(batch.tokens)
        begun = start_loops(model, model.encode(batch.tokens, ctx), ctx, [most] * count)
        for state in unroll(model, begun, ctx):
            h.append(state.h[:, -1])
            logits.append(model.decode(readout(model, state), ctx)[:, -1])
            if state.halted is not None:
                mass.append(state.halted.tracker.mass[:, -1])
    return Watched(Observed(begun.h[:, -1], h, logits, mass or None), batch.targets[:, -1])


def own_rule(model: RecurrentDepthLM) -> Rule | None:
    """How the model's head halts: ACT at its threshold, PonderNet at the median of its exits."""
    head = model.config.halting
    if isinstance(head, ACTConfig):
        return CumulativeThreshold(threshold=head.threshold)
    return CumulativeThreshold(threshold=0.5) if isinstance(head, PonderNetConfig) else None


def learnt(arm: Arm, model: RecurrentDepthLM, walks: Walks, count: int) -> float:
    """Accuracy at the trained loops on walks that choose rates, the mean over the hops of training.

    An arm that trains its longest walks only is asked those: a model that steps exactly answers
    shorter ones at other numbers of loops.
    """
    loops, hops = model.config.num_loops, TRAINED_HOPS[-1:] if arm.longest_only else TRAINED_HOPS
    return fmean(watch(model, walks, n, count, CALIBRATION, loops).accuracy()[-1] for n in hops)


def record(
    model: RecurrentDepthLM, walks: Walks, hops: Iterable[int], count: int, most: int
) -> dict[str, Any]:
    """Everything that a run stores of its exits, JSON.

    Accuracy by hops and loops, up to twice ``most`` loops; then, with at most ``most`` loops, when
    predictions settle, and for the model's own halting and every rule what ``follow`` gives, on the
    walks that are reported, and loops and accuracy on those that choose thresholds.
    """
    deep = {n: watch(model, walks, n, count, TEST, 2 * most) for n in hops}
    test = {n: walk.up_to(most) for n, walk in deep.items()}
    chosen_on = {n: watch(model, walks, n, count, CALIBRATION, most) for n in hops}
    own = own_rule(model)

    def both(rule: Rule) -> dict[str, Any]:
        other = {n: walk.follow(rule) for n, walk in chosen_on.items()}
        return {
            "rule": to_dict(rule),
            "test": {str(n): walk.follow(rule) for n, walk in test.items()},
            "calibration": {str(n): _brief(found) for n, found in other.items()},
        }

    return {
        "accuracy": {str(n): walk.accuracy() for n, walk in deep.items()},
        "calibration": {str(n): walk.accuracy() for n, walk in chosen_on.items()},
        "settled": {str(n): _histogram(walk.settled(), most) for n, walk in test.items()},
        "own": None if own is None else both(own),
        "own_deep": None
        if own is None
        else {str(n): _brief(walk.follow(own)) for n, walk in deep.items()},
        "rules": [both(rule) for rule in RULES],
        "leaks": {str(n): walks.leak_baselines(n) for n in hops},
    }


def briefly(
    model: RecurrentDepthLM, walks: Walks, hops: Iterable[int], count: int, most: int
) -> dict[str, Any]:
    """Of ``record``, accuracy by hops and loops and what the model's own halting does."""
    deep = {n: watch(model, walks, n, count, TEST, 2 * most) for n in hops}
    own = own_rule(model)
    return {
        "accuracy": {str(n): walk.accuracy() for n, walk in deep.items()},
        "own": None
        if own is None
        else {"test": {str(n): walk.up_to(most).follow(own) for n, walk in deep.items()}},
    }


def mean_loops(histogram: Iterable[int]) -> float:
    """The mean of a histogram over 1, 2, 3 ... loops."""
    counts = np.asarray(list(histogram))
    return float((counts * np.arange(1, len(counts) + 1)).sum() / counts.sum())


def follows_difficulty(test: Mapping[str, Any], hops: Iterable[int]) -> float:
    """Rank correlation of loops taken with hops, over walks; 0 if all take equally many."""
    pairs = [
        (n, loops)
        for n in hops
        for loops, count in enumerate(test[str(n)]["loops"], start=1)
        for _ in range(count)
    ]
    return rank_correlation(pairs) or 0.0


def _brief(found: Mapping[str, Any]) -> list[float]:
    return [mean_loops(found["loops"]), found["right"]]


def _histogram(loops: Int[Tensor, " N"], most: int) -> list[int]:
    counts: list[int] = torch.bincount(loops, minlength=most + 1)[1:].tolist()
    return counts
