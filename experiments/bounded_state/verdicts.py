"""What the stored runs say about each claim."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.claim import Claim, Decision, Verdict, graded, no_result, verdict
from experiments.interval import gap, t_interval
from experiments.run_store import Result, Results

CHANCE = 1 / 6
MISSING = "Runs are missing."
CONSTRAINED, FREE = ("lti", "original_lti"), ("linear", "add", "none")
Rows = list[dict[str, Any]]


def fixed_rows(results: Results) -> Rows:
    """One row per injection, rho, scale and seed of the fixed weights."""
    found = [r for arm in results.arms if arm.startswith("fixed_") for r in results.of(arm)]
    return [
        {
            "kind": r.run.arm.removeprefix("fixed_"),
            "seed": r.run.seed,
            "shown": r.data["shown"],
            **row,
        }
        for r in found
        for row in r.data["rows"]
    ]


def norm_at(row: Mapping[str, Any], loops: int) -> float:
    """The norm after so many loops, infinite if it is no number any more."""
    value = dict(zip(row["shown"], row["norms"], strict=True)).get(loops)
    return math.inf if value is None else float(value)


def lti_cannot_grow(claim: Claim, results: Results, rows: Rows) -> Verdict:
    """Every LTI state under its bound, at fixed weights and in trained models."""
    own = [row for row in rows if row["kind"] in CONSTRAINED]
    add = [row for row in rows if row["kind"] == "add"]
    trained = [r for kind in CONSTRAINED for r in results.of(f"trained_{kind}")]
    if not own or not add or not trained:
        return no_result(claim, MISSING)
    last, limit = own[0]["shown"][-1], claim.thresholds
    shares = [max(map(float_or_inf, row["norms"])) / row["bound"] for row in own]
    shares += [
        max(map(float_or_inf, r.data["norms"].values())) / r.data["bound"]["bound"] for r in trained
    ]
    growth = [
        norm_at(row, last) / norm_at(row, 1000)
        for row in own
        if row["rho"] <= limit["settled_rho"] and 1000 in row["shown"]
    ]
    grown = max(growth, default=math.inf)
    holds = max(shares) <= 1 + 1e-4 and grown <= limit["most_growth"]
    decision: Decision = "holds" if holds else "fails"
    near = useless_from(own, add, last)
    largest = max(row["rho"] for row in own)
    slow = [row for row in own if row["rho"] == largest and row["kind"] == "lti"]
    plain = {(row["seed"], row["scale"]): norm_at(row, last) for row in add}
    as_add = statistics.mean(norm_at(r, last) / plain[r["seed"], r["scale"]] for r in slow)
    sentence = (
        f"No state passed its bound (|B e| + max |R|) / (1 - rho): the nearest reached "
        f"{max(shares):.2f} of it, in {len(own)} models with fixed weights over {last:,} loops and "
        f"{len(trained)} trained ones; up to rho {limit['settled_rho']:g} the norm after {last:,} "
        f"loops is at most {grown:.2f} of that after 1,000. The bound moves with the weights, and "
        f"says nothing where it is above what plain addition reaches: from rho {near} on. At rho "
        f"{largest:g} the state has {as_add:.2f} of plain addition's norm after {last:,} loops."
    )
    if not holds:
        sentence = (
            f"The largest share of the bound is {max(shares):.3g}; up to rho "
            f"{limit['settled_rho']:g} the norm after {last:,} loops is up to {grown:.3g} of that "
            "after 1,000."
        )
    return Verdict(
        claim=claim.name, decision=decision, sentence=sentence, number=max(shares), figure="norms"
    )


def useless_from(own: Rows, add: Rows, last: int) -> str:
    """By scale of the weights, the least rho whose bound is above the norm of plain addition."""
    plain = {(row["seed"], row["scale"]): norm_at(row, last) for row in add}
    by_scale: dict[float, dict[float, list[bool]]] = {}
    for row in own:
        if row["kind"] == "lti":
            above = row["bound"] > plain[row["seed"], row["scale"]]
            by_scale.setdefault(row["scale"], {}).setdefault(row["rho"], []).append(above)
    said = []
    for scale, by_rho in sorted(by_scale.items()):
        found = [f"{rho:g}" for rho, above in sorted(by_rho.items()) if all(above)]
        said.append(f"{found[0] if found else 'none tried'} (weights times {scale:g})")
    return " and ".join(said)


def blow_up(claim: Claim, results: Results, rows: Rows) -> Verdict:
    """Growth of plain addition at fixed weights, and trainings lost without a constraint."""
    limit = claim.thresholds
    add = [row for row in rows if row["kind"] == "add"]
    lost = {kind: lost_by_seed(results, kind) for kind in (*CONSTRAINED, *FREE)}
    seeds = sorted(set.intersection(*(set(shares) for shares in lost.values())))
    if not add or not seeds:
        return no_result(claim, MISSING)
    last = add[0]["shown"][-1]
    slopes = [math.log10(norm_at(row, last) / norm_at(row, last // 10)) for row in add]
    slope = t_interval(slopes)
    free = [statistics.mean(lost[kind][seed] for kind in FREE) for seed in seeds]
    kept = [statistics.mean(lost[kind][seed] for kind in CONSTRAINED) for seed in seeds]
    between = gap(free, kept)
    parts = (
        between.difference.mean >= limit["least_lost_gap"],
        slope.mean >= limit["least_slope"],
    )
    free_w = results.of("trained_linear")
    broken = sum(r.data["norms"]["256"] is None for r in free_w)
    sentence = (
        f"With fixed weights and plain addition the norm grows as the {slope.mean:.2f}th power of "
        f"the loops. With a free W_h the state of {broken} of {len(free_w)} trained models is no "
        f"finite number at 256 loops. Of the trainings without a constraint "
        f"{statistics.mean(free):.0%} were lost, of those with one {statistics.mean(kept):.0%}."
    )
    return verdict(claim.name, graded(parts), sentence, between.difference, figure="outcomes")


def past_one(claim: Claim, results: Results, rows: Rows) -> Verdict:
    """W_h past 1: at fixed weights, and in trained models whose W_h went there."""
    limit = claim.thresholds
    far = [r for r in rows if r["kind"] == "linear" and r["rho"] == limit["far_rho"]]
    trained = results.of("trained_linear")
    past = [r for r in trained if r.data["rho"] > 1]
    if not far or not trained:
        return no_result(claim, MISSING)
    last = far[0]["shown"][-1]
    unstable = all(math.isinf(norm_at(row, last)) for row in far)
    if len(past) < limit["least_runs"]:
        return Verdict(
            claim=claim.name,
            decision="not decidable here",
            sentence=f"Only {len(past)} of {len(trained)} trained models have rho(W_h) above 1.",
        )
    reference = means(results, "trained_lti")
    broken = [
        r for r in past if trained_accuracy(r) < reference.get(cell_of(r), 1) - limit["margin"]
    ]
    share = len(broken) / len(past)
    breaks = share >= limit["least_broken"]
    decision = graded((unstable, breaks))
    how = "is no finite number" if unstable else "is still a number"
    sentence = (
        f"At fixed weights with rho {limit['far_rho']:g} the state {how} after {last:,} loops. Of "
        f"{len(trained)} trained models with a free W_h, {len(past)} ended with rho above 1 (up to "
        f"{max(r.data['rho'] for r in past):.2f}); {share:.0%} of them score more than "
        f"{limit['margin']:g} below the LTI model of the same rate and loops."
    )
    return Verdict(
        claim=claim.name, decision=decision, sentence=sentence, number=share, figure="outcomes"
    )


def drifts(claim: Claim, results: Results) -> Verdict:
    """What is kept of the answers at eight times the trained loops, with e and without."""
    kept, best = {}, {}
    for kind in ("none", "lti"):
        found = best_rate(results, f"trained_{kind}", loops=4)
        kept[kind] = [kept_share(r) for r in found]
        best[kind] = [trained_accuracy(r) - CHANCE for r in found]
    limit = claim.thresholds
    if any(len(values) < 2 for values in kept.values()):
        return no_result(claim, MISSING)
    if any(statistics.mean(values) < limit["least_learnt"] for values in best.values()):
        return Verdict(
            claim=claim.name,
            decision="no result",
            sentence="An arm learnt too little at its trained loops to lose anything.",
        )
    between = gap(kept["lti"], kept["none"])
    with_e, without = (statistics.mean(kept[kind]) for kind in ("lti", "none"))
    noise = without <= limit["most_kept_without"] and with_e >= limit["least_kept_with"]
    part = between.is_result and between.difference.mean >= limit["least_gap"]
    decision: Decision = "holds" if noise else "in part" if part else "fails"
    sentence = (
        f"At eight times the trained loops a model whose input enters only once keeps "
        f"{without:.0%} of what it answers above chance at its trained loops, one with LTI "
        f"injection {with_e:.0%}."
    )
    return verdict(claim.name, decision, sentence, between.difference, figure="outcomes")


# --- reading trained runs -------------------------------------------------------------------------


def float_or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def cell_of(result: Result) -> tuple[float, int]:
    """The rate and the trained loops."""
    return result.run.settings["rate"], result.run.settings["train_loops"]


def trained_accuracy(result: Result) -> float:
    return float(result.data["accuracy"][str(result.run.settings["train_loops"])])


def kept_share(result: Result) -> float:
    """Of the accuracy above chance at the trained loops, what is left at eight times as many."""
    deep = result.data["accuracy"][str(8 * result.run.settings["train_loops"])]
    return float((deep - CHANCE) / max(trained_accuracy(result) - CHANCE, 1e-6))


def means(results: Results, arm: str) -> dict[tuple[float, int], float]:
    """Mean accuracy at the trained loops, by rate and loops."""
    cells: dict[tuple[float, int], list[float]] = {}
    for result in results.of(arm):
        cells.setdefault(cell_of(result), []).append(trained_accuracy(result))
    return {cell: statistics.mean(values) for cell, values in cells.items()}


def best_rate(results: Results, arm: str, loops: int) -> Sequence[Result]:
    """The arm's runs at these loops with the rate of the lowest mean training loss, none lost."""
    own = [r for r in results.of(arm) if r.run.settings["train_loops"] == loops]
    lost = {cell_of(r) for r in results.lost if r.run.arm == arm}
    by_cell: dict[tuple[float, int], list[Result]] = {}
    for result in own:
        if cell_of(result) not in lost:
            by_cell.setdefault(cell_of(result), []).append(result)
    if not by_cell:
        return []
    return min(by_cell.values(), key=lambda runs: statistics.mean(r.data["loss"] for r in runs))


def lost_by_seed(results: Results, kind: str) -> dict[int, float]:
    """Share of the injection's trainings that were lost, by seed."""
    own = [r for r in results if r.run.arm == f"trained_{kind}"]
    seeds = sorted({r.run.seed for r in own})
    return {
        seed: statistics.mean(float(r.lost is not None) for r in own if r.run.seed == seed)
        for seed in seeds
    }
