"""The verdicts, from stored results only; the rules in words are in ``expected.json``."""

import functools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from experiments import equal_accuracy
from experiments.chain_of_thought.arm import ARMS, SILENT, STACK, SUMS, TRAINED_HOPS, WALKS, Arm
from experiments.claim import (
    Claim,
    Conclusion,
    Decision,
    Table,
    Verdict,
    graded,
    no_result,
    verdict,
)
from experiments.interval import Interval, gap, t_interval
from experiments.run_store import Results
from openmythos.config import counts

Data = Mapping[str, Any]
MOST_LOOPS = 16
BEYOND = ("10", "12", "14", "16")
LONGEST = str(max(TRAINED_HOPS))
LEVEL = 0.9  # of the longest walks of training, at the trained loops: what counts as equal


# --- what one run says ----------------------------------------------------------------------------


def at_best(data: Data, hops: str) -> float:
    """Accuracy at the best number of loops."""
    return float(max(data["right"][hops]))


@functools.cache
def equal_loops(hops: int) -> int:
    """The loops of a silent answer that cost nearest to a written one of the stack."""
    target, one = STACK.test_flops(hops, STACK.loops), SILENT.test_flops(hops, 1)
    more = (target - one) / (SILENT.test_flops(hops, 2) - one)  # linear in the loops
    return min(MOST_LOOPS, 1 + max(0, round(more)))


def at_equal_flops(data: Data, hops: str) -> float:
    """Accuracy of a silent answer at the best number of loops within a written one's FLOPs."""
    return float(max(data["right"][hops][: equal_loops(int(hops))]))


def hops_per_loop(data: Data, enough: float) -> float | None:
    """The slope of hops over the fewest loops that answer them; None with fewer than two depths.

    Over the trained lengths that reach ``enough`` at any number of loops.
    """
    pairs = []
    for hops in TRAINED_HOPS:
        curve = data["right"][str(hops)]
        needed = [loops for loops, share in enumerate(curve, start=1) if share >= enough]
        if needed:
            pairs.append((needed[0], hops))
    loops, lengths = np.asarray(pairs, dtype=np.float64).reshape(-1, 2).T
    if len(set(loops)) < 2:
        return None
    return float(np.polyfit(loops, lengths, 1)[0])


def named(data: Data, slope: float) -> float:
    """How often the model would say the entity that its loop has reached, on the longest walks.

    At loop t that is the entity after t times ``slope`` hops; over the loops before the last.
    """
    names, longest = data["names"], int(LONGEST)
    places = [round(loop * slope) for loop in range(1, len(names) + 1)]
    shares = [names[loop][place - 1] for loop, place in enumerate(places) if 1 <= place < longest]
    return fmean(shares) if shares else 0.0


def reach(data: Data, enough: float) -> int:
    """The most hops that are answered, at the best number of loops; 0 if none are."""
    return max((int(hops) for hops in data["right"] if at_best(data, hops) >= enough), default=0)


# --- what the arms say ----------------------------------------------------------------------------


def beyond(at: Callable[[Data, str], float]) -> Callable[[Data], float]:
    """The mean over lengths that training never had."""
    return lambda data: fmean(at(data, hops) for hops in BEYOND)


def _enough_runs(results: Results, arms: Sequence[Arm]) -> bool:
    return all(len(results.of(arm.name)) > 1 for arm in arms)


def one_loop_is_one_step(claim: Claim, results: Results) -> Verdict:
    """Whether a loop does, says and reaches what a written step does."""
    least = claim.thresholds
    if not _enough_runs(results, (SILENT, STACK)):
        return no_result(claim, "An arm has fewer than two runs.")
    runs = [r.data for r in results.of(SILENT.name)]
    slopes = [slope for d in runs if (slope := hops_per_loop(d, least["enough"])) is not None]
    if len(slopes) < len(runs):
        return no_result(claim, "A silent model did not learn walks that need two loops.")
    slope = t_interval(slopes)
    said = t_interval([named(d, s) for d, s in zip(runs, slopes, strict=True)])
    silent, written = (
        fmean(results.values(arm.name, lambda d: reach(d, least["enough"])))
        for arm in (SILENT, STACK)
    )
    held = [
        slope.low >= least["rate"],
        said.low >= least["named"],
        abs(silent - written) <= least["reach"],
    ]
    return verdict(
        claim.name,
        graded(held),
        f"A loop of two layers does {slope.mean:.2f} hops, a written step one. Read out after a "
        f"loop, the model names the entity that it has reached in {said.mean:.0%} of the walks of "
        f"{LONGEST} hops (chance 6 %). The longest walks that are answered have "
        f"{silent:.1f} hops silently, with as many loops as it takes, and {written:.1f} in "
        f"writing; silently some shorter ones are not (the table).",
        slope,
        figure="right_by_hops",
    )


def wins_on_arithmetic(claim: Claim, results: Results) -> Verdict:
    """Whether writing beats silence on sums."""
    silent, stack = SUMS[0], SUMS[1]
    if not _enough_runs(results, (silent, stack)):
        return no_result(claim, "An arm has fewer than two runs.")
    between = _mean_gap(results, stack, silent, at_best, (LONGEST, *BEYOND))
    difference, least = between, claim.thresholds["gap"]
    decision: Decision = "no result"
    if difference.low >= least:
        decision = "holds"
    elif difference.high < least:
        decision = "fails"
    said = "; ".join(
        f"{n} numbers: {_percent(results, stack, n, at_best)} in writing, "
        f"{_percent(results, silent, n, at_best)} silently"
        for n in (LONGEST, *BEYOND)
    )
    return verdict(claim.name, decision, f"{said}.", difference, figure="right_by_hops")


def writing_goes_further(claim: Claim, results: Results) -> Verdict:
    """Whether writing extrapolates further, at equal FLOPs and with free loops."""
    if not _enough_runs(results, (SILENT, STACK)):
        return no_result(claim, "An arm has fewer than two runs.")
    least = claim.thresholds["gap"]
    equal = _mean_gap(results, STACK, SILENT, at_equal_flops, BEYOND)
    free = _mean_gap(results, STACK, SILENT, at_best, BEYOND)
    ahead = [each.low >= least for each in (equal, free)]
    behind = [each.high < least for each in (equal, free)]
    decision: Decision = "no result"
    if all(ahead):
        decision = "holds"
    elif all(behind):
        decision = "fails"
    elif all(a or b for a, b in zip(ahead, behind, strict=True)):
        decision = "in part"
    said = "; ".join(
        f"{n} hops: {_percent(results, STACK, n, at_best)} in writing, "
        f"{_percent(results, SILENT, n, at_equal_flops)} silently at equal FLOPs "
        f"(up to {equal_loops(int(n))} loops), {_percent(results, SILENT, n, at_best)} at the best "
        "number of loops"
        for n in BEYOND
    )
    return verdict(claim.name, decision, f"{said}.", equal, figure="right_by_hops")


VERDICTS: dict[str, Callable[[Claim, Results], Verdict]] = {
    "a-loop-is-a-step-of-thought": one_loop_is_one_step,
    "writing-wins-on-arithmetic": wins_on_arithmetic,
    "writing-goes-further": writing_goes_further,
}


def _mean_gap(
    results: Results,
    writes: Arm,
    silent: Arm,
    how: Callable[[Data, str], float],
    lengths: Sequence[str],
) -> Interval:
    """Accuracy in writing minus that of silence, over these lengths."""
    first = results.values(writes.name, lambda d: fmean(at_best(d, n) for n in lengths))
    second = results.values(silent.name, lambda d: fmean(how(d, n) for n in lengths))
    return gap(first, second).difference


def _percent(results: Results, arm: Arm, hops: str, how: Callable[[Data, str], float]) -> str:
    return f"{fmean(results.values(arm.name, lambda d: how(d, hops))):.0%}"


# --- tables and figures ---------------------------------------------------------------------------


def conclude(claims: Mapping[str, Claim], results: Results) -> Conclusion:
    """One verdict per claim, the tables and the figures' data."""
    verdicts = [VERDICTS[name](claim, results) for name, claim in claims.items()]
    return Conclusion(verdicts=verdicts, tables=_tables(results), figures=_figures(results))


def _tables(results: Results) -> list[Table]:
    done = next((r.data for r in results if r.lost is None), None)
    if done is None:
        return []
    lengths = list(done["right"])
    rows, chains = [], []
    for arm in ARMS.values():
        runs = results.of(arm.name)
        if not runs:
            continue
        how = [("best number of loops", at_best)]
        if not arm.writes:
            how.insert(0, ("equal FLOPs", at_equal_flops))
        rows += [
            [arm.in_words + ("" if arm.writes else f", {words}"),
             *(_percent(results, arm, n, of) for n in lengths)]
            for words, of in how
        ]  # fmt: skip
        if arm.writes:
            whole = (results.values(arm.name, lambda d, n=n: d["whole"][n]) for n in lengths)
            chains.append([arm.in_words, *(f"{fmean(each):.0%}" for each in whole)])
    leaks = [
        [name.replace("_", " "), *(f"{done['leaks'][n][name]:.3f}" for n in lengths)]
        for name in done["leaks"][lengths[0]]
    ]
    return [
        Table("Right answers by number of hops, or of numbers to add", ["arm", *lengths], rows),
        _equal(results, lengths),
        Table("Chains without a mistake", ["arm", *lengths], chains),
        _matched(),
        _flops(lengths),
        Table("What guessers reach that do not follow the walk", ["guesser", *lengths], leaks),
    ]


def _equal(results: Results, lengths: Sequence[str]) -> Table:
    """Right answers of runs that are as good on the longest walks of training."""
    return equal_accuracy.table(
        f"Right answers at equal training accuracy, at the best number of loops: the first "
        f"checkpoint with {LEVEL:g} of {LONGEST} hops",
        ["arm"],
        lengths,
        [
            ([arm.in_words], [result.data["equal_accuracy"] for result in own])
            for arm in ARMS.values()
            if (own := results.of(arm.name))
        ],
        lambda _, early: (f"{fmean(at_best(one, n) for one in early):.0%}" for n in lengths),
    )


def _matched() -> Table:
    """Parameters and FLOPs of the arms at the longest walks of training, from the silent loop."""
    longest = max(TRAINED_HOPS)

    def figures(arm: Arm) -> list[float]:
        parameters = counts.total_params(arm.model)
        return [parameters, arm.training_flops(longest), arm.test_flops(longest, arm.loops)]

    own, rows = figures(SILENT), []
    for arm in WALKS:
        cells = [
            f"{value:,.0f} ({(value - target) / target:+.1%})"
            for value, target in zip(figures(arm), own, strict=True)
        ]
        rows.append([arm.in_words, *cells])
    header = ["arm", "parameters", "training FLOPs per walk", "test FLOPs per answer"]
    title = f"Arms at {longest} hops, every token counted, and how far from the silent loop"
    return Table(title, header, rows)


def _flops(lengths: Sequence[str]) -> Table:
    """Million FLOPs of an answer, and how far a silent one at equal FLOPs is from the stack's."""
    rows = []
    for arm in WALKS:
        cells = []
        for n in map(int, lengths):
            loops = arm.loops if arm.writes else equal_loops(n)
            found, own = arm.test_flops(n, loops), STACK.test_flops(n, STACK.loops)
            cells.append(f"{found / 1e6:.2f} ({(found - own) / own:+.0%}, {loops} loops)")
        rows.append([arm.in_words, *cells])
    return Table("Million FLOPs of an answer, every token counted", ["arm", *lengths], rows)


def _figures(results: Results) -> dict[str, Any]:
    done = next((r.data for r in results if r.lost is None), None)
    lengths = [] if done is None else list(done["right"])
    curves: dict[str, Any] = {}
    for arm in ARMS.values():
        if not results.of(arm.name):
            continue
        curves[arm.name] = {
            "best": [results.values(arm.name, lambda d, n=n: at_best(d, n)) for n in lengths]
        }
        if not arm.writes:
            curves[arm.name]["equal"] = [
                results.values(arm.name, lambda d, n=n: at_equal_flops(d, n)) for n in lengths
            ]
    silent = [r.data["names"] for r in results.of(SILENT.name)]
    return {
        "right_by_hops": {"hops": [int(n) for n in lengths], "arms": curves},
        "named_by_loop": np.mean(silent, axis=0)[:8].tolist() if silent else [],
    }
