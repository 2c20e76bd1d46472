"""What the stored results say about each claim."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from experiments import equal_accuracy
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
from experiments.matching import matching, training_flops
from experiments.run_store import Result, Results
from experiments.text_loops import curve
from experiments.text_loops.arm import (
    ARMS,
    LEVELS,
    LOOP,
    MEAN_CONTEXT,
    MOE,
    STACKS,
    TRAINED_LOOPS,
    ZOO,
    model_of,
    size_of,
)
from openmythos.config import ModelConfig, counts

FITTED = range(1, 2 * TRAINED_LOOPS + 1)
FAR = 32  # loops, eight times the trained mean
TOO_FEW = "Fewer than two seeds."
CLAIMED = (3, 9)  # the loops that the claim about experts names


def conclude(claims: Mapping[str, Claim], results: Results) -> Conclusion:
    """All verdicts, tables and figures; "no result" where seeds are missing."""
    decided = [
        saturating(claims["saturating-exponential"], results.of(LOOP)),
        other_experts(claims["different-experts-at-loops-3-and-9"], results.of(MOE)),
        changing_experts(claims["subsets-by-depth"], results.of(MOE)),
        capacity(claims["capacity-without-compute"], results),
        *(against(claims[name], results, arm) for name, arm in zip(EQUAL, STACKS, strict=True)),
        harder_tokens(claims["harder-tokens-more-loops"], results.of(LOOP)),
        last_loop_cache(claims["last-loop-cache"], results.of(LOOP)),
    ]
    return Conclusion(
        verdicts=decided,
        tables=[
            matching({arm: size_of(arm) for arm in ARMS}, LOOP, MEAN_CONTEXT),
            bits_table(results),
            equal_table(results),
            fits_table([*results.of(LOOP), *results.of(ZOO)]),
            surprisal_table(results.of(LOOP)),
        ],
        figures={
            "bits_by_loops": {
                "loops": {arm: mean_curve(results.of(arm)) for arm in (LOOP, MOE)},
                "seeds": [r.data["by_loops"] for r in results.of(LOOP)],
                "stacks": {arm: mean_of(results.of(arm), "held_out") for arm in STACKS},
                "trained": TRAINED_LOOPS,
            },
            "surprisal": mean_fifths(results.of(LOOP)),
            "experts": mean_sets(results.of(MOE)),
        },
    )


EQUAL = ("equal-parameters", "equal-training-flops", "equal-test-flops")


# --- one claim each -------------------------------------------------------------------------------


def saturating(claim: Claim, seeds: Sequence[Result]) -> Verdict:
    """Whether the exponential fits, better than a power law, and does not turn back."""
    if len(seeds) < 2:
        return no_result(claim, TOO_FEW)
    found = [laws(result) for result in seeds]
    gain, exponential, power, fall = (
        t_interval([one[name] for one in found])
        for name in ("gain", "exponential", "power", "fall")
    )
    apart = gap([one["power"] for one in found], [one["exponential"] for one in found])
    decision: Decision
    if gain.mean <= 2 * gain.deviation:
        decision, why = "no result", "the gain is not above two of its seed deviations"
    elif exponential.mean > claim.thresholds["most_residual"]:
        decision, why = "fails", "the exponential misses the curve"
    elif not apart.is_result or abs(apart.difference.mean) < claim.thresholds["least_apart"]:
        decision, why = "not decidable here", "a power law fits as well"
    elif apart.difference.mean < 0:
        decision, why = "fails", "a power law fits better"
    elif fall.mean > claim.thresholds["most_fall"]:
        decision, why = "in part", "the exponential fits, but the curve turns back"
    else:
        decision, why = "holds", "the exponential fits, the power law does not"
    said = (
        f"Loops gain {gain} bits per byte, and {why}: the largest residual of the exponential is "
        f"{exponential.mean:.1%} of the gain, of the power law {power.mean:.1%}; at {FAR} loops "
        f"{fall.mean:.1%} of the gain are lost again."
    )
    return verdict(claim.name, decision, said, exponential, figure="bits_by_loops")


def laws(result: Result) -> dict[str, float]:
    """The gain, and residuals and the fall past the trained depth as shares of it."""
    bits = {int(loops): value for loops, value in result.data["by_loops"].items()}
    loops = [n for n in FITTED if n in bits]
    losses = [bits[n] for n in loops]
    gain = losses[0] - min(losses)
    share = 1 / gain if gain > 0 else 0.0
    fits = {law.__name__: curve.fit(law, loops, losses) for law in curve.LAWS}
    residuals = {name: found.residual * share for name, found in fits.items()}
    return {"gain": gain, "fall": (bits[max(bits)] - min(losses)) * share, **residuals}


def other_experts(claim: Claim, seeds: Sequence[Result]) -> Verdict:
    """Whether the sets at the two loops that the claim names are disjoint."""
    if len(seeds) < 2:
        return no_result(claim, TOO_FEW)
    first, second = (loop - 1 for loop in CLAIMED)
    own, other = (
        t_interval([result.data["experts"][name][first][second] for result in seeds])
        for name in ("disjoint", "other_disjoint")
    )
    decision: Decision = "fails"
    if own.mean >= claim.thresholds["of_other_tokens"] * other.mean:
        decision = "holds"
    elif own.mean >= claim.thresholds["least_share"]:
        decision = "in part"
    said = (
        f"At loops 3 and 9, {own.mean:.1%} of the tokens have no expert in common; two different "
        f"tokens have none in common {other.mean:.1%} of the time."
    )
    return verdict(claim.name, decision, said, own, figure="experts")


def changing_experts(claim: Claim, seeds: Sequence[Result]) -> Verdict:
    """Whether the set changes from loop to loop."""
    if len(seeds) < 2:
        return no_result(claim, TOO_FEW)
    changed = [
        t_interval([1 - result.data["experts"]["same"][loop][loop + 1] for result in seeds])
        for loop in range(TRAINED_LOOPS - 1)
    ]
    decision = graded(pair.mean >= claim.thresholds["least_changed"] for pair in changed)
    shares = ", ".join(f"{pair.mean:.0%}" for pair in changed)
    said = f"The set of experts changes for {shares} of the tokens between loops 1-2, 2-3, 3-4."
    smallest = min(changed, key=lambda pair: pair.mean)
    return verdict(claim.name, decision, said, smallest, figure="experts")


def capacity(claim: Claim, results: Results) -> Verdict:
    """Parameters and cost of the core with experts against the dense one, and what they buy."""
    dense, sparse = (bits_of(results.of(arm)) for arm in (LOOP, MOE))
    if len(dense) < 2 or len(sparse) < 2:
        return no_result(claim, TOO_FEW)
    parameters, cost = (
        size(model_of(MOE)) / size(model_of(LOOP)) for size in (core_params, core_flops)
    )
    found = gap(sparse, dense)
    difference = found.difference
    limits = claim.thresholds
    counted = parameters >= limits["least_parameters"] and cost <= limits["most_cost"]
    decision: Decision = "fails"
    if counted and not found.is_result:
        decision = "in part"
    elif counted and difference.mean < 0:
        decision = "holds"
    said = (
        f"The core with experts has {parameters:.2f} times the parameters at {cost:.2f} times the "
        f"cost of a loop, and {difference.mean:+.4f} bits per byte (seed deviation "
        f"{found.deviation:.4f})."
    )
    return verdict(claim.name, decision, said, difference, figure="bits_by_loops")


def against(claim: Claim, results: Results, stack: str) -> Verdict:
    """The dense looped model at its trained depth against a plain stack."""
    looped, plain = (bits_of(results.of(arm)) for arm in (LOOP, stack))
    if len(looped) < 2 or len(plain) < 2:
        return no_result(claim, TOO_FEW)
    found = gap(looped, plain)
    difference = found.difference
    decision: Decision = "no result"
    if found.is_result:
        decision = "holds" if difference.mean < 0 else "fails"
    said = (
        f"{TRAINED_LOOPS} loops are at {np.mean(looped):.4f} bits per byte, the plain stack at "
        f"{np.mean(plain):.4f}: {difference.mean:+.4f}, seed deviation {found.deviation:.4f}."
    )
    return verdict(claim.name, decision, said, difference, figure="bits_by_loops")


def harder_tokens(claim: Claim, seeds: Sequence[Result]) -> Verdict:
    """Whether the exit rule takes more loops where a bigram model is surprised."""
    if len(seeds) < 2:
        return no_result(claim, TOO_FEW)
    found = t_interval([result.data["surprisal"]["rank_correlation"] or 0.0 for result in seeds])
    fifths = mean_fifths(seeds)["loops"]
    decision: Decision = "fails"
    if found.low > 0:
        enough = found.mean >= claim.thresholds["least_correlation"]
        decision = "holds" if enough else "in part"
    said = (
        f"The rank correlation is {found.mean:.2f}: the rule takes {fifths[0]:.2f} loops for the "
        f"fifth of the tokens that a bigram model expects most, {fifths[-1]:.2f} for the last."
    )
    return verdict(claim.name, decision, said, found, figure="surprisal")


def last_loop_cache(claim: Claim, seeds: Sequence[Result]) -> Verdict:
    """What the smallest cache costs."""
    if len(seeds) < 2:
        return no_result(claim, TOO_FEW)
    costs = []
    for result in seeds:
        bits = result.data["cache"]
        costs.append((bits["last_loop"] - bits["exact"]) / bits["bytes_per_token"])
    found, limits = t_interval(costs), claim.thresholds
    decision: Decision = "fails"
    if found.mean <= limits["in_part_below"]:
        decision = "holds" if found.mean <= limits["holds_below"] else "in part"
    said = (
        f"A cache of the last loop costs {found.mean:+.4f} bits per byte at {TRAINED_LOOPS} loops, "
        f"where it is 1/{TRAINED_LOOPS} of the core's cache."
    )
    return verdict(claim.name, decision, said, found)


# --- tables and figures ---------------------------------------------------------------------------


def bits_table(results: Results) -> Table:
    """What each arm reached, with its training loss: equal steps are not equal training."""
    rows = []
    for arm in ARMS:
        seeds = results.of(arm)
        if not seeds:
            continue
        trained, held = (
            t_interval([result.data[name] for result in seeds])
            for name in ("training_bits", "held_out")
        )
        apart = held.mean - trained.mean
        rows.append([arm, _digits(trained), _digits(held), f"{apart:+.3f}"])
    return Table(
        "Bits per byte",
        ["arm", "training text, last tenth of the steps", "held-out text", "difference"],
        rows,
    )


def equal_table(results: Results) -> Table:
    """Held-out text of runs that predict training text as well, and what it took."""

    def shown(names: Sequence[str], early: Sequence[Mapping[str, Any]]) -> list[str]:
        arm = names[1]
        settings = results.of(arm)[0].run.settings
        tokens = settings["batch_size"] * settings["seq_len"]
        steps = fmean(one["step"] for one in early)
        flops = steps * tokens * training_flops(size_of(arm), MEAN_CONTEXT)
        parts = (fmean(one[name] for one in early) for name in ("training", "held_out"))
        gain = fmean(one["one_loop"] - one["held_out"] for one in early)
        return [
            f"{flops / 1e12:.1f}",
            *(f"{part:.4f}" for part in parts),
            "" if arm in STACKS else f"{gain:+.4f}",
        ]

    return equal_accuracy.table(
        "At equal training loss: the first checkpoint with as few bits per byte of training text",
        ["training text, bits", "arm"],
        [
            *("training TFLOPs", "training text", "held-out text"),
            f"gained from 1 to {TRAINED_LOOPS} loops",
        ],
        [
            ([f"{level:g}", arm], [r.data["equal_loss"][str(level)] for r in results.of(arm)])
            for level in LEVELS
            for arm in ARMS
        ],
        shown,
    )


def fits_table(seeds: Sequence[Result]) -> Table:
    """Per model: the gain, both laws, and the loss past the trained depth."""
    rows = []
    for result in seeds:
        found = laws(result)
        shares = (f"{found[name]:.1%}" for name in ("exponential", "power", "fall"))
        name = "zoo:text" if result.run.arm == ZOO else f"seed {result.run.seed}"
        rows.append([name, f"{found['gain']:.4f}", *shares])
    header = ["model", "gain, bits per byte", "largest residual of the exponential", "power law"]
    return Table(
        "The test-time curve, 1 to 8 loops, as shares of the gain",
        [*header, f"lost again at {FAR} loops"],
        rows,
    )


def surprisal_table(seeds: Sequence[Result]) -> Table:
    """Fifths of the tokens by their surprisal under a bigram model."""
    found = mean_fifths(seeds)
    rows = [
        [str(number), *(f"{found[name][number - 1]:.2f}" for name in FIFTHS[:-1]),
         f"{found['bits_gained'][number - 1]:+.4f}"]
        for number in range(1, 1 + len(found["loops"]))
    ]  # fmt: skip
    header = ["fifth", "bits of a bigram model", "bits of the looped model", "loops taken"]
    return Table(
        "Tokens by difficulty",
        [*header, f"bits gained from 1 to {TRAINED_LOOPS} loops"],
        rows,
    )


FIFTHS = ("bigram_bits", "model_bits", "loops", "bits_gained")


def mean_fifths(seeds: Sequence[Result]) -> dict[str, list[float]]:
    """Means over seeds."""
    rows = [result.data["surprisal"]["fifths"] for result in seeds]
    return {
        name: [float(np.mean([seed[i][name] for seed in rows])) for i in range(5)] if rows else []
        for name in FIFTHS
    }


def mean_sets(seeds: Sequence[Result]) -> dict[str, Any]:
    """Jaccard's agreement of the experts at two loops: of a token, and of two tokens."""
    return {
        name: np.mean([result.data["experts"][name] for result in seeds], axis=0).tolist()
        if seeds
        else []
        for name in ("jaccard", "other_jaccard")
    }


def mean_curve(seeds: Sequence[Result]) -> dict[str, float]:
    """Bits per byte by number of loops."""
    if not seeds:
        return {}
    return {
        loops: float(np.mean([result.data["by_loops"][loops] for result in seeds]))
        for loops in seeds[0].data["by_loops"]
    }


def mean_of(seeds: Sequence[Result], name: str) -> float | None:
    """None without seeds."""
    return float(np.mean([result.data[name] for result in seeds])) if seeds else None


def bits_of(seeds: Sequence[Result]) -> list[float]:
    """Held-out bits per byte at the trained depth."""
    return [result.data["held_out"] for result in seeds]


def core_params(config: ModelConfig) -> float:
    """Of the looped layers."""
    return float(sum(p.weights.params for p in counts.parts(config) if p.name.startswith("core.")))


def core_flops(config: ModelConfig) -> float:
    """Of one loop, per token."""
    two, one = (
        counts.forward_flops(config, num_loops=n, context_length=MEAN_CONTEXT) for n in (2, 1)
    )
    return float(two - one)


def _digits(found: Interval) -> str:
    return f"{found.mean:.4f} ± {found.deviation:.4f}"
