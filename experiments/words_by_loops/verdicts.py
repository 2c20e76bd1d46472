"""The verdicts, from stored results only; the rules in words are in ``expected.json``."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from experiments.claim import Claim, Conclusion, Decision, Found, Table, by_rule
from experiments.interval import Gap, gap, t_interval
from experiments.run_store import Results

ARMS = ("fixed", "sampled")
TRAINED, UNTRAINED, WALKS = "3", ("1", "2", "6"), ("2", "3")  # loops, loops, hops
LEARNT = ("1", "2", "3")  # hops
Data = Mapping[str, Any]


def right(data: Data, hops: Sequence[str], loops: Sequence[str]) -> float:
    """Mean accuracy over these hops and loops."""
    return fmean(data["answers"][h][n]["right"] for h in hops for n in loops)


def bits(data: Data, loops: Sequence[str]) -> float:
    """Mean bits per token of base text over these loops."""
    return fmean(data["base_bits"][n] for n in loops)


def conclude(claims: Mapping[str, Claim], results: Results) -> Conclusion:
    """One verdict per claim, the tables and the figure's data."""
    seeds = {arm: len(results.of(arm)) for arm in ARMS}
    rules: dict[str, Callable[[Results, Mapping[str, float]], Found]] = {
        "loops-answer-more": loops_answer_more,
        "sampled-depth-keeps-the-dial": sampled_keeps_the_dial,
        "sampled-depth-spares-base-text": sampled_spares_base_text,
    }
    return Conclusion(
        verdicts=[
            by_rule(claims[name], partial(rule, results), seeds, "by_loops")
            for name, rule in rules.items()
        ],
        tables=[answer_table(results), base_table(results), leak_table(results)],
        figures={"by_loops": drawn(results)},
    )


def loops_answer_more(results: Results, least: Mapping[str, float]) -> Found:
    """Accuracy at the trained loops minus that at one, after training at sampled depth."""
    number = t_interval(
        results.values("sampled", lambda d: right(d, WALKS, [TRAINED]) - right(d, WALKS, ["1"]))
    )
    decision: Decision = "no result"
    if number.low >= least["least_gain"]:
        decision = "holds"
    elif number.high < least["least_gain"]:
        decision = "fails"
    one, three = (
        fmean(results.values("sampled", partial(right, hops=WALKS, loops=[n])))
        for n in ("1", TRAINED)
    )
    said = (
        f"Trained at sampled depth, questions of two and three hops are answered to {three:.1%} at "
        f"three loops and {one:.1%} at one."
    )
    return decision, number, said


def sampled_keeps_the_dial(results: Results, least: Mapping[str, float]) -> Found:
    """Sampled minus fixed, accuracy at the loops that fixed depth never ran."""
    found = between(results, lambda d: right(d, LEARNT, UNTRAINED))
    at_trained = between(results, lambda d: right(d, LEARNT, [TRAINED])).difference.mean
    said = (
        f"Accuracy of sampled minus fixed depth: {found.difference.mean:+.3f} at 1, 2 and 6 loops, "
        f"which fixed depth was not trained at, {at_trained:+.3f} at the three that it was."
    )
    return graded_gap(found, least["least_gap"]), found.difference, said


def sampled_spares_base_text(results: Results, least: Mapping[str, float]) -> Found:
    """Fixed minus sampled, bits per token of base text over all loops."""
    loops = (*UNTRAINED, TRAINED)
    own = {arm: results.values(arm, lambda d: bits(d, loops)) for arm in ARMS}
    found, before = gap(own["fixed"], own["sampled"]), bits(results.of("before")[0].data, loops)
    said = (
        f"Bits per token of base text, mean over 1, 2, 3 and 6 loops: {before:.3f} before, "
        f"{fmean(own['fixed']):.3f} after training at fixed, "
        f"{fmean(own['sampled']):.3f} at sampled depth."
    )
    return graded_gap(found, least["least_gap"]), found.difference, said


def between(results: Results, value: Callable[[Data], float]) -> Gap:
    """How far the sampled arm is above the fixed one."""
    return gap(results.values("sampled", value), results.values("fixed", value))


def graded_gap(found: Gap, least: float) -> Decision:
    """Holds from the least gap on, in part if smaller, fails below zero; within noise no result."""
    if not found.is_result:
        return "no result"
    if found.difference.mean <= 0:
        return "fails"
    return "holds" if found.difference.mean >= least else "in part"


# --- tables and the figure's data -----------------------------------------------------------------


def arms(results: Results) -> list[str]:
    """Those with results, in the order of tables."""
    return [arm for arm in ("before", *ARMS) if results.of(arm)]


def answer_table(results: Results) -> Table:
    """Accuracy by arm, hops and loops."""
    rows = []
    for arm in arms(results):
        answers = results.of(arm)[0].data["answers"]
        for hops, of_loops in answers.items():
            means = [
                fmean(results.values(arm, partial(right, hops=[hops], loops=[n]))) for n in of_loops
            ]
            rows.append([arm, hops, *(f"{mean:.1%}" for mean in means)])
    header = ["arm", "hops", "1 loop", "2 loops", "3 loops", "6 loops"]
    return Table("Right answers among the six friends, means over seeds", header, rows)


def base_table(results: Results) -> Table:
    """Bits per token of base text."""
    rows = []
    for arm in arms(results):
        loops = results.of(arm)[0].data["base_bits"]
        of = (t_interval(results.values(arm, partial(bits, loops=[n]))) for n in loops)
        rows.append([arm, *(f"{each.mean:.3f} ± {each.deviation:.3f}" for each in of)])
    header = ["arm", "1 loop", "2 loops", "3 loops", "6 loops"]
    title = "Bits per token of base text (two's power is perplexity), and seed deviations"
    return Table(title, header, rows)


def leak_table(results: Results) -> Table:
    """What guessers reach on the questions that were asked."""
    done = next((r.data for r in results if r.lost is None), None)
    found = {} if done is None else done["leaks"]
    names = list(next(iter(found.values()), {}))
    rows = [[name, *(f"{found[hops][name]:.3f}" for hops in found)] for name in names]
    return Table("Leak baselines by hops", ["guesser", *found], rows)


def drawn(results: Results) -> dict[str, Any]:
    """By arm: accuracy by hops and loops, and bits by loops, one value per seed."""
    return {
        arm: {
            "right": {
                hops: {n: results.values(arm, partial(right, hops=[hops], loops=[n])) for n in of}
                for hops, of in results.of(arm)[0].data["answers"].items()
            },
            "bits": {
                n: results.values(arm, partial(bits, loops=[n]))
                for n in results.of(arm)[0].data["base_bits"]
            },
        }
        for arm in arms(results)
    }
