"""The verdicts, from stored results only; the rules in words are in ``expected.json``."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.claim import Claim, Decision, Verdict, no_result, verdict
from experiments.halting.arm import (
    ACT_ARMS,
    MOST_LOOPS,
    PLAIN,
    PONDERNET,
    SHALLOW,
    STEPPING,
    STEPPING_LOOPS,
    TRAINED_HOPS,
    Arm,
)
from experiments.halting.exits import follows_difficulty, mean_loops
from experiments.interval import Interval, gap, t_interval
from experiments.run_store import Results

Data = Mapping[str, Any]
DEPTHS = ("fixed", "variable")
WITH_COST = [arm for depth in DEPTHS for arm in ACT_ARMS[depth] if arm.cost]
LONGEST = str(max(TRAINED_HOPS))


# --- what one run says ----------------------------------------------------------------------------


def over_trained(value: Callable[[str], float]) -> float:
    """The mean over walks of 1 to 8 hops, as many of each."""
    return fmean(value(str(hops)) for hops in TRAINED_HOPS)


def at_depth(data: Data, loops: int, walks: str = "accuracy") -> float:
    """Accuracy if every walk takes so many loops."""
    return over_trained(lambda hops: data[walks][hops][loops - 1])


def best_fixed(data: Data, walks: str = "accuracy") -> float:
    """Accuracy at the best number of loops up to the trained maximum."""
    return max(at_depth(data, loops, walks) for loops in range(1, MOST_LOOPS + 1))


def own_loops(data: Data) -> float:
    """Mean loops under the model's own halting."""
    return over_trained(lambda hops: mean_loops(data["own"]["test"][hops]["loops"]))


def own_right(data: Data) -> float:
    """Accuracy under the model's own halting."""
    return over_trained(lambda hops: data["own"]["test"][hops]["right"])


def own_share(data: Data, first: int, last: int, hops: Iterable[int] = TRAINED_HOPS) -> float:
    """Share of walks whose own halting takes ``first`` to ``last`` loops."""
    taken = [data["own"]["test"][str(n)]["loops"] for n in hops]
    return fmean(sum(loops[first - 1 : last]) / sum(loops) for loops in taken)


def own_lost(data: Data) -> float:
    """What the model's own halting loses against its best fixed depth."""
    return round(best_fixed(data) - own_right(data), 9)


def wasted(data: Data) -> float:
    """Share of the loops that come after the prediction has settled, under its own halting."""
    found = [data["own"]["test"][str(n)] for n in TRAINED_HOPS]
    weights = [mean_loops(each["loops"]) for each in found]
    return sum(w * each["wasted"] for w, each in zip(weights, found, strict=True)) / sum(weights)


def halted_early(data: Data) -> float:
    """Of the walks that settled in the first half of the loops, the share that halts early."""
    found = [data["own"]["test"][str(n)] for n in TRAINED_HOPS]
    return sum(f["halted_of_them"] for f in found) / max(1, sum(f["settled_early"] for f in found))


def rule_on(rule: Data, walks: str, hops: Iterable[str]) -> tuple[float, float]:
    """Mean loops and accuracy of a rule, on walks of these hops, as many of each."""
    if walks == "calibration":
        pairs = [rule["calibration"][n] for n in hops]
    else:
        found = [rule["test"][n] for n in hops]
        pairs = [(mean_loops(each["loops"]), each["right"]) for each in found]
    return fmean(loops for loops, _ in pairs), fmean(right for _, right in pairs)


def chosen_rule(data: Data, within: float, hops: Sequence[str]) -> Data | None:
    """The rule with the fewest loops among those within so much of the best depth.

    On the walks that choose, not on those that are reported. None: no rule is.
    """
    curves = [data["calibration"][n][:MOST_LOOPS] for n in hops]
    best = max(fmean(column) for column in zip(*curves, strict=True))
    fit = [r for r in data["rules"] if rule_on(r, "calibration", hops)[1] >= best - within]
    return min(fit, key=lambda r: rule_on(r, "calibration", hops)[0], default=None)


def all_hops() -> list[str]:
    """The trained numbers of hops, as keys."""
    return [str(hops) for hops in TRAINED_HOPS]


def saved_by_rule(data: Data, within: float) -> tuple[float, float, int]:
    """Loops that the chosen rule saves, as a share of the shallowest sufficient fixed depth.

    Returns:
        The share, what the rule loses against that depth, and the depth. A model where no rule is
        within the limit saves nothing and loses nothing: it runs at the fixed depth.
    """
    limit = best_fixed(data, "calibration") - within
    depths = range(1, MOST_LOOPS + 1)
    depth = next(n for n in depths if at_depth(data, n, "calibration") >= limit)
    rule = chosen_rule(data, within, all_hops())
    if rule is None:
        return 0.0, 0.0, depth
    loops, right = rule_on(rule, "test", all_hops())
    return 1 - loops / depth, at_depth(data, depth) - right, depth


def rule_at(data: Data, most_loops: float) -> float:
    """The best accuracy of any rule or fixed depth that takes at most so many loops on average."""
    ruled = [rule_on(rule, "test", all_hops()) for rule in data["rules"]]
    fixed = [(float(n), at_depth(data, n)) for n in range(1, MOST_LOOPS + 1)]
    return max((right for loops, right in ruled + fixed if loops <= most_loops), default=0.0)


# --- what the arms say ----------------------------------------------------------------------------


def learnt(results: Results, arm: Arm, least: float) -> bool:
    """Whether the arm has at least two runs, and all of them learnt the walks of training."""
    found = results.values(arm.name, best_fixed)
    return len(found) > 1 and min(found) >= least


def _ordered(held: bool, failed: bool) -> Decision:
    return "holds" if held else "fails" if failed else "in part"


def always_most(claim: Claim, results: Results) -> Verdict:
    """Whether ACT without a cost runs all loops."""
    least = claim.thresholds
    arms = [ACT_ARMS["fixed"][0], ACT_ARMS["variable"][0], SHALLOW]
    if not all(learnt(results, arm, least["learnt"]) for arm in arms):
        return no_result(claim, "An arm without ponder cost did not learn the walks.")
    share = [
        t_interval(results.values(arm.name, lambda d: own_share(d, MOST_LOOPS, MOST_LOOPS)))
        for arm in arms
    ]
    easy = [t_interval(results.values(arm.name, lambda d: _own_at(d, "1"))) for arm in arms]
    hard = [t_interval(results.values(arm.name, lambda d: _own_at(d, LONGEST))) for arm in arms]
    decision = _ordered(
        all(each.low >= least["holds"] for each in share),
        all(each.high <= least["fails"] for each in share),
    )
    said = "; ".join(
        f"{arm.in_words}: {a.mean:.1f} loops at 1 hop, {b.mean:.1f} at {LONGEST}, "
        f"all {MOST_LOOPS} in {s.mean:.0%} of the walks"
        for arm, a, b, s in zip(arms, easy, hard, share, strict=True)
    )
    most = max(share, key=lambda each: each.mean)
    return verdict(claim.name, decision, f"{said}.", most, figure="loops_by_hops")


def collapse(claim: Claim, results: Results) -> Verdict:
    """Whether ACT without a cost takes one loop under variable depth."""
    least, arms = claim.thresholds, [ACT_ARMS["variable"][0], SHALLOW]
    if min(len(results.of(arm.name)) for arm in arms) < 2:
        return no_result(claim, "An arm with variable depth has fewer than two runs.")
    hard = range(2, max(TRAINED_HOPS) + 1)
    share = [
        t_interval(results.values(arm.name, lambda d: own_share(d, 1, 1, hard))) for arm in arms
    ]
    decision = _ordered(
        all(each.low >= least["holds"] for each in share),
        all(each.high <= least["fails"] for each in share),
    )
    said = ", ".join(f"{s.mean:.1%} ({a.in_words})" for a, s in zip(arms, share, strict=True))
    return verdict(
        claim.name,
        decision,
        f"Walks of two or more hops that take one loop: {said}.",
        max(share, key=lambda each: each.mean),
        figure="loops_by_hops",
    )


def cost_sets_depth(claim: Claim, results: Results) -> Verdict:
    """Whether loops fall as the ponder cost rises."""
    least, falls, said, drops = claim.thresholds, [], [], []
    for depth in DEPTHS:
        loops = [results.values(arm.name, own_loops) for arm in ACT_ARMS[depth]]
        right = [results.values(arm.name, own_right) for arm in ACT_ARMS[depth]]
        if min(map(len, loops)) < 2:
            return no_result(claim, f"An arm with {depth} depth has fewer than two runs.")
        drop = gap(loops[0], loops[-1])
        means = [fmean(each) for each in loops]
        ordered = all(a > b for a, b in itertools.pairwise(means))
        falls.append((drop.is_result and drop.difference.mean >= least["loops"], ordered))
        drops.append(drop.difference)
        costs = zip(ACT_ARMS[depth], means, right, strict=True)
        said.append(
            f"{depth} depth: "
            + ", ".join(
                f"{m:.2f} loops ({fmean(r):.0%} right) at {arm.cost:g}" for arm, m, r in costs
            )
        )
    decision = _ordered(
        all(drop and ordered for drop, ordered in falls), not any(drop for drop, _ in falls)
    )
    least_drop = min(drops, key=lambda each: each.mean)
    return verdict(claim.name, decision, "; ".join(said) + ".", least_drop, "depth_by_cost")


def follows(claim: Claim, results: Results) -> Verdict:
    """Whether easy walks take few loops, hard ones many, and none is wasted."""
    least = claim.thresholds
    found: list[tuple[Arm, Interval, Interval, float]] = []
    for arm in WITH_COST:
        ranks = results.values(
            arm.name, lambda d: follows_difficulty(d["own"]["test"], TRAINED_HOPS)
        )
        if len(ranks) > 1 and fmean(results.values(arm.name, own_lost)) <= least["lost"]:
            waste = t_interval(results.values(arm.name, wasted))
            found.append(
                (arm, t_interval(ranks), waste, fmean(results.values(arm.name, own_right)))
            )
    following = [each for each in found if each[1].low >= least["follows"]]
    if not any(len(results.of(arm.name)) > 1 for arm in WITH_COST):
        return no_result(claim, "No arm with a ponder cost has two runs.")
    if not found:
        return Verdict(
            claim=claim.name,
            decision="fails",
            sentence=f"No ponder cost keeps accuracy within {least['lost']:.0%} of the best depth.",
        )
    arm, rank, waste, right = min(following or found, key=lambda each: each[2].mean)
    held = any(each[2].high <= least["wasted"] for each in following)
    easy, hard = (
        t_interval(results.values(arm.name, lambda d, n=n: _own_at(d, n))) for n in ("1", LONGEST)
    )
    return verdict(
        claim.name,
        _ordered(held, not following),
        f"{arm.in_words}: rank correlation of loops with hops {rank.mean:.2f}, {easy.mean:.1f} "
        f"loops at 1 hop and {hard.mean:.1f} at {LONGEST}, {waste.mean:.0%} of the loops after "
        f"the answer had settled, {right:.1%} right.",
        rank,
        figure="loops_by_hops",
    )


def converged_halt(claim: Claim, results: Results) -> Verdict:
    """Whether walks whose answer has settled halt before the last loop."""
    least = claim.thresholds
    arms = [
        arm
        for arm in WITH_COST
        if len(results.of(arm.name)) > 1
        and fmean(results.values(arm.name, own_lost)) <= least["lost"]
    ]
    if not arms:
        return Verdict(
            claim=claim.name,
            decision="not decidable here",
            sentence="No ponder cost keeps the accuracy, so no halting is worth judging.",
        )
    shares = [t_interval(results.values(arm.name, halted_early)) for arm in arms]
    decision = _ordered(
        all(each.low >= least["holds"] for each in shares),
        all(each.high < least["fails"] for each in shares),
    )
    said = ", ".join(
        f"{s.mean:.1%} ({a.in_words}, {fmean(results.values(a.name, own_right)):.0%} right, "
        f"{fmean(results.values(a.name, wasted)):.0%} of its loops after settling)"
        for a, s in zip(arms, shares, strict=True)
    )
    half = MOST_LOOPS // 2
    return verdict(
        claim.name,
        decision,
        f"Of the walks that settle within {half} loops, before loop {MOST_LOOPS} halt: {said}.",
        min(shares, key=lambda each: each.mean),
        figure="loops_by_hops",
    )


def overthinking(claim: Claim, results: Results) -> Verdict:
    """Whether halting keeps what loops beyond the needed ones would spoil."""
    least = claim.thresholds
    stepping, ponder = ([r.data for r in results.of(a.name)] for a in (STEPPING, PONDERNET))
    if min(len(stepping), len(ponder)) < 2:
        return no_result(claim, "An arm has fewer than two runs.")
    by_rule = [_lost_by_rule(d, least["within"]) for d in stepping]
    by_head = [best_fixed(d) - over_trained(lambda n, d=d: d["own_deep"][n][1]) for d in ponder]
    stepped = 2 * STEPPING_LOOPS
    cases = [
        (STEPPING, t_interval([_best(d) - d["accuracy"][LONGEST][stepped - 1] for d in stepping]),
         t_interval(by_rule), f"the chosen rule, {LONGEST} hops"),
        (PONDERNET, t_interval([best_fixed(d) - at_depth(d, 2 * MOST_LOOPS) for d in ponder]),
         t_interval(by_head), "its own halting"),
    ]  # fmt: skip
    shown = [case for case in cases if case[1].low >= least["fall"]]
    kept = [case[2].mean <= least["within"] for case in shown]
    decision: Decision = "not decidable here"
    if shown:
        decision = _ordered(all(kept), not any(kept))
    said = "; ".join(
        f"{arm.in_words}: at twice the trained loops accuracy changes by {-fall.mean:+.2f} "
        f"({-fall.high:+.2f} to {-fall.low:+.2f}"
        + ("" if fall.low >= least["fall"] else ", so that this arm does not count")
        + f"), with {how} by {-lost.mean:+.3f}"
        for arm, fall, lost, how in cases
    )
    spared = [
        t_interval(
            results.values(
                arm.name, lambda d: at_depth(d, MOST_LOOPS) - at_depth(d, 2 * MOST_LOOPS)
            )
        ).mean
        for arm in (ACT_ARMS["fixed"][0], PLAIN)
        if results.of(arm.name)
    ]
    others = ", ".join(f"{each:.3f}" for each in spared)
    counted = ", ".join(arm.in_words for arm, *_ in shown) or "no arm"
    return verdict(
        claim.name,
        decision,
        f"Decided by: {counted}. {said}. For comparison, ACT at fixed depth and the model without "
        f"a head, from {MOST_LOOPS} to {2 * MOST_LOOPS} loops: {others}.",
        max((case[2] for case in cases), key=lambda each: each.mean),
        figure="overthinking",
    )


def rule_beats_fixed(claim: Claim, results: Results) -> Verdict:
    """Whether a rule read after training is worth more than the shallowest sufficient depth."""
    least = claim.thresholds
    if not learnt(results, PLAIN, least["learnt"]):
        return no_result(claim, "The arm without a head did not learn the walks.")
    found = [saved_by_rule(r.data, least["within"]) for r in results.of(PLAIN.name)]
    saved = t_interval([share for share, _, _ in found])
    lost = fmean(loss for _, loss, _ in found)
    cheap = lost <= least["within"]
    decision = _ordered(cheap and saved.low >= least["holds"], not cheap or saved.low <= 0)
    depths = ", ".join(str(depth) for _, _, depth in found)
    by_seed = ", ".join(f"{share:.0%}" for share, _, _ in found)
    return verdict(
        claim.name,
        decision,
        f"Against the shallowest sufficient fixed depth ({depths} loops by seed), the rule chosen "
        f"on other walks saves {saved.mean:.0%} of the loops ({by_seed} by seed) and "
        f"{'loses' if lost > 0 else 'gains'} {abs(lost):.3f} in accuracy.",
        saved,
        figure="rules_and_depths",
    )


def confidence_matches(claim: Claim, results: Results) -> Verdict:
    """Whether rules read after training match learnt halting at the same number of loops."""
    least = claim.thresholds
    arms = [*ACT_ARMS["fixed"], *ACT_ARMS["variable"], PONDERNET]
    plain = {r.run.seed: r.data for r in results.of(PLAIN.name)}
    gaps: dict[str, Interval] = {}
    for arm in arms:
        pairs = [(r.data, plain[r.run.seed]) for r in results.of(arm.name) if r.run.seed in plain]
        if len(pairs) > 1:
            gaps[arm.in_words] = t_interval(
                [rule_at(other, own_loops(data)) - own_right(data) for data, other in pairs]
            )
    if len(gaps) < len(arms):
        return no_result(claim, "An arm has fewer than two runs.")
    matched = [each.low >= -least["within"] for each in gaps.values()]
    worse = [each.high < -least["within"] for each in gaps.values()]
    said = ", ".join(f"{each.mean:+.3f} ({name})" for name, each in gaps.items())
    return verdict(
        claim.name,
        _ordered(all(matched), all(worse)),
        f"Accuracy of the best rule minus that of the learnt halting, at its mean loops: {said}.",
        min(gaps.values(), key=lambda each: each.mean),
        figure="rules_and_depths",
    )


VERDICTS: dict[str, Callable[[Claim, Results], Verdict]] = {
    "without-cost-always-the-maximum": always_most,
    "without-cost-collapse-to-one-loop": collapse,
    "cost-sets-depth": cost_sets_depth,
    "easy-few-hard-many-nothing-wasted": follows,
    "converged-halt-early": converged_halt,
    "halting-prevents-overthinking": overthinking,
    "rule-beats-fixed-depth": rule_beats_fixed,
    "confidence-matches-learnt-halting": confidence_matches,
}


def _own_at(data: Data, hops: str) -> float:
    return mean_loops(data["own"]["test"][hops]["loops"])


def _best(data: Data) -> float:
    return float(max(data["accuracy"][LONGEST]))


def _lost_by_rule(data: Data, within: float) -> float:
    """On the longest walks of training: best depth minus the rule chosen on other walks.

    If no rule is within the limit there, the one that is most often right there.
    """
    rule = chosen_rule(data, within, [LONGEST])
    if rule is None:
        rule = max(data["rules"], key=lambda r: rule_on(r, "calibration", [LONGEST])[1])
    return _best(data) - rule_on(rule, "test", [LONGEST])[1]
