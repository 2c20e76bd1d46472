"""What the results say about each claim; the rules in words are in expected.json."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import equal_accuracy
from experiments.claim import (
    MIN_SEEDS,
    Claim,
    Conclusion,
    Decision,
    Found,
    Table,
    Verdict,
    by_gap,
    by_rule,
    graded,
)
from experiments.depth_dial.run import EQUAL_ACCURACY
from experiments.interval import gap, t_interval
from experiments.run_store import Results
from experiments.what_loops_read.arms import ARMS, NEW_HOPS, SIGNALS, TRAINED_HOPS

OLD, NEW = str(TRAINED_HOPS), str(NEW_HOPS)


def conclude(claims: Mapping[str, Claim], results: Results) -> Conclusion:
    """The conclusion from the stored results; no verdict where an arm has under three seeds."""
    rules = Rules(claims, {arm: [result.data for result in results.of(arm)] for arm in ARMS})
    return Conclusion(
        verdicts=[rules.decide(name) for name in claims],
        tables=[
            rules.maps_table(),
            rules.equal_table(),
            rules.intervals_table(),
            rules.signals_table(),
        ],
        figures={"growing_map": rules.growing_map(), "bits": rules.bits_by_arm()},
    )


class Rules:
    """One method per claim, named as the claim."""

    def __init__(
        self, claims: Mapping[str, Claim], data: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        self.claims, self.data = claims, data

    def decide(self, name: str) -> Verdict:
        """The verdict on a claim."""
        rule: Callable[[Mapping[str, float]], Found] = getattr(self, name.replace("-", "_"))
        seeds = {arm: len(self.data[arm]) for arm in ARMS}
        figure = "growing_map" if name == "two-by-two" else "bits"
        return by_rule(self.claims[name], rule, seeds, figure)

    def bits(self, arm: str, place: str = OLD) -> list[float]:
        """Mean bits between consecutive working loops, by seed; seeds without any are left out."""
        found = [data["maps"][place]["mean_bits"] for data in self.data[arm]]
        return [value for value in found if value is not None]

    def null(self, arm: str) -> float:
        """The greatest upper end of the shuffled nulls over seeds."""
        ends = [data["maps"][OLD]["null"] for data in self.data[arm]]
        return max((end[1] for end in ends if end is not None), default=0.0)

    def agreement(self, arm: str) -> float:
        """Mean difference of necessity and sufficiency over the map's cells and seeds."""
        cells = [cell for seed in self.disagreements(arm) for cell in seed]
        return float(np.mean(cells)) if cells else float("inf")

    def disagreements(self, arm: str) -> list[list[float]]:
        """Differences of necessity and sufficiency in each cell of the map, by seed."""
        found = []
        for data in self.data[arm]:
            cells: list[float] = []
            pair = (data["maps"][OLD][name] for name in ("necessity", "sufficiency"))
            for need, enough in zip(*pair, strict=True):
                known = [(a, b) for a, b in zip(need, enough, strict=True) if None not in (a, b)]
                cells += [abs(a - b) for a, b in known]
            found.append(cells)
        return found

    def novelties(self, arm: str) -> list[float]:
        """Mean novelty over the loops where it is defined, by seed."""
        found = []
        for data in self.data[arm]:
            known = [value for value in data.get("novelty", ()) if value is not None]
            if known:
                found.append(float(np.mean(known)))
        return found

    def kept(self, arm: str, loops: int) -> list[float]:
        """Accuracy on 8 hops at so many loops, as a share of the best of 1 to 32, by seed."""
        return [data["curve"][loops - 1] / max(*data["curve"], 1e-9) for data in self.data[arm]]

    # --- the rules --------------------------------------------------------------------------------

    def clean_measure(self, limits: Mapping[str, float]) -> Found:
        """Whether consecutive loops of trained models read different tokens."""
        passed, agreed = [], []
        for arm in ("fixed", "sampled", "stack"):
            values = self.bits(arm)
            if len(values) < MIN_SEEDS:
                continue
            number = t_interval(values)
            if number.mean >= limits["least_bits"] and number.low > self.null(arm):
                passed.append(arm)
            if self.agreement(arm) <= limits["most_disagreement"]:
                agreed.append(arm)
        control = self.bits("untrained")
        silent = not control or float(np.mean(control)) < limits["least_bits"]
        decision: Decision = "in part" if passed else "fails"
        if len(passed) == len(agreed) == 3 and silent:
            decision = "holds"
        fixed = self.bits("fixed")
        said = (
            f"Loops differ above the shuffled null in: {', '.join(passed) or 'none'}; necessity "
            f"and sufficiency agree in: {', '.join(agreed) or 'none'}; the untrained control "
            f"{'does no work' if not control else f'has {np.mean(control):.2f} bits'}."
        )
        return decision, t_interval(fixed) if fixed else None, said

    def two_by_two(self, limits: Mapping[str, float]) -> Found:
        """The share of each row's mass on its own two columns, walks never trained."""
        shares = []
        for data in self.data["fixed"]:
            rows = np.array(data["maps"][NEW]["necessity"], dtype=float)
            rows = np.nan_to_num(rows).clip(min=0)
            own = [
                row[2 * t : 2 * t + 2].sum() / max(row.sum(), 1e-9) for t, row in enumerate(rows)
            ]
            shares.append(float(np.mean(own)))
        number = t_interval(shares)
        said = f"{NEW} hops: {number.mean:.2f} of what a loop reads is its own next two tokens."
        decision: Decision = "holds" if number.mean >= limits["most"] else "in part"
        return ("fails" if number.mean < limits["half"] else decision), number, said

    def sampled_blurs(self, limits: Mapping[str, float]) -> Found:
        """Fixed depth against sampled depth."""
        fixed, sampled = self.bits("fixed"), self.bits("sampled")
        if min(len(fixed), len(sampled)) < MIN_SEEDS:
            return "no result", None, "Fewer than three seeds whose loops work."
        found = gap(fixed, sampled)
        said = (
            f"Fixed {np.mean(fixed):.2f} bits, sampled {np.mean(sampled):.2f}. The second also "
            "trains mixed walks: which of the two blurs is not known."
        )
        return by_gap(found, limits["least_gap"], said)

    def slightly_different(self, limits: Mapping[str, float]) -> Found:
        """The first loop's map in place of the last trained one's, on the same states."""
        ends = {arm: [data["operator"][-1][0] for data in self.data[arm]] for arm in SIGNALS}
        means = {arm: float(np.mean(values)) for arm, values in ends.items()}
        within = [a for a, m in means.items() if limits["least"] <= m <= limits["slight"]]
        above = [arm for arm, mean in means.items() if mean >= limits["least"]]
        decision: Decision = "in part" if above else "fails"
        decision = "holds" if len(within) == len(SIGNALS) else decision
        plain = max(max(map(max, data["operator"])) for data in self.data["fixed"])
        said = "Of a loop's step: " + ", ".join(f"{arm} {mean:.2f}" for arm, mean in means.items())
        said = f"{said}; without a signal {plain:.2g}."
        return decision, t_interval(ends["sinusoidal"]), said

    def avoids_the_same(self, limits: Mapping[str, float]) -> Found:
        """Whether a loop without a signal does the same every time."""
        plain = self.bits("fixed")
        if len(plain) < MIN_SEEDS:
            return "not decidable here", None, "The plain loop's loops do not work."
        above = []
        for arm in SIGNALS:
            found = gap(self.bits(arm), plain) if len(self.bits(arm)) >= MIN_SEEDS else None
            if found and found.is_result and found.difference.mean > 0:
                above.append((arm, found.difference.mean))
        same = float(np.mean(plain)) <= limits["same_bits"]
        all_far = len([1 for _, mean in above if mean >= limits["least_gap"]]) == len(SIGNALS)
        decision: Decision = "holds" if same and all_far else "in part" if above else "fails"
        each = ", ".join(f"{arm} {np.mean(self.bits(arm) or [0]):.2f}" for arm in SIGNALS)
        said = f"Without any signal {np.mean(plain):.2f} bits between loops; with one: {each}."
        return decision, t_interval(plain), said

    def not_circular(self, limits: Mapping[str, float]) -> Found:
        """Whether a loop without a signal brings nothing that the one before does not predict."""
        plain = self.novelties("fixed")
        if len(plain) < MIN_SEEDS:
            return (
                "not decidable here",
                None,
                "Novelty is undefined: nothing is asked of the loops.",
            )
        mean = float(np.mean(plain))
        better = []
        for arm in SIGNALS:
            own = self.novelties(arm)
            found = gap(own, plain) if len(own) >= MIN_SEEDS else None
            if found and found.is_result and found.difference.mean >= limits["least_gap"]:
                better.append(arm)
        decision: Decision = "in part"
        if mean <= limits["circular"] and len(better) == len(SIGNALS):
            decision = "holds"
        elif mean >= limits["new"]:
            decision = "fails"
        each = ", ".join(f"{arm} {np.mean(self.novelties(arm) or [0]):.2f}" for arm in SIGNALS)
        said = f"Novelty of the loops without any signal {mean:.2f}; with one: {each}."
        return decision, t_interval(plain), said

    def no_pure_repeat(self, limits: Mapping[str, float]) -> Found:
        """LoRA per loop: the first loop's weights at every loop."""
        lost = [d["as_first_loop"]["own"] - d["as_first_loop"]["first"] for d in self.data["lora"]]
        apart = float(np.mean([data["operator"][-1][0] for data in self.data["lora"]]))
        number = t_interval(lost)
        used = number.mean >= limits["least_loss"] and number.low > 0
        decision: Decision = "in part" if apart >= limits["least"] else "fails"
        decision = "holds" if used and apart >= limits["least"] else decision
        by_seed = ", ".join(f"{value:.2f}" for value in lost)
        said = (
            f"LoRA changes {apart:.2f} of a loop's step; with the first loop's weights at every "
            f"loop {number.mean:.2f} of the accuracy is lost ({by_seed} by seed)."
        )
        return decision, number, said

    def _without_injection(self, limits: Mapping[str, float], loops: int) -> Found:
        best = float(np.mean([max(data["curve"]) for data in self.data["no_injection"]]))
        without, given = self.kept("no_injection", loops), self.kept("sampled", loops)
        number, between = t_interval(without), gap(given, without)
        said = (
            f"At {loops} loops {number.mean:.2f} of the best accuracy is left without the input, "
            f"{np.mean(given):.2f} with it; the best without it is {best:.2f}."
        )
        if best < limits["learnt"]:
            return "not decidable here", number, said
        if number.mean <= limits["lost"] and np.mean(given) >= limits["kept"]:
            return "holds", number, said
        if between.is_result and between.difference.mean > 0 and number.mean < limits["kept"]:
            return "in part", number, said
        return "fails", number, said

    def lost_track(self, limits: Mapping[str, float]) -> Found:
        """The input given once, ten loops."""
        return self._without_injection(limits, int(limits["loops"]))

    def drifts(self, limits: Mapping[str, float]) -> Found:
        """The input given once, thirty-two loops."""
        return self._without_injection(limits, int(limits["loops"]))

    def light_coda(self, limits: Mapping[str, float]) -> Found:
        """What the coda adds to a state from which the answer can be read linearly."""
        shares = [
            data["coda"]["linear"] / max(data["coda"]["model"], 1e-9) for data in self.data["coda"]
        ]
        through = []
        for data in self.data["coda"]:
            found = data["maps"][OLD]
            pair = zip(found["logits_through_loops"], found["logits_whole"], strict=True)
            through.append(float(np.mean([a / b for a, b in pair if abs(b) > 0.1] or [0.0])))
        number, loops = t_interval(shares), float(np.mean(through))
        said = (
            f"A linear map of the state before the coda has {number.mean:.2f} of the model's "
            f"accuracy; {loops:.2f} of what a corrupted token moves passes through the loops."
        )
        parts = number.mean >= limits["least_share"], loops >= limits["least_through"]
        return graded(parts), number, said

    def breadth_first(self, limits: Mapping[str, float]) -> Found:
        """No task here has more than one path."""
        return "not decidable here", None, "A walk has one path: there is nothing to search."

    # --- tables and figures -----------------------------------------------------------------------

    def maps_table(self) -> Table:
        """The map's numbers by arm."""
        header = ["arm", "what", "8 hops", "loops", "bits", "shuffled", "working loops"]
        header += ["necessity and sufficiency differ", "column sum", "10 hops", "bits at 10 hops"]
        header += ["bits at the trained loops"]
        rows = []
        for arm in ARMS:
            if not self.data[arm]:
                continue
            old, new = ([d["maps"][hops] for d in self.data[arm]] for hops in (OLD, NEW))
            trained = [d["at_trained_loops"]["mean_bits"] for d in self.data[arm]]
            sums = [s for one in old for s in one["necessity_sum"] if s is not None]
            rows.append([
                arm, ARMS[arm].says, _mean([one["accuracy"] for one in old]),
                _mean([one["loops"] for one in old], 1), _mean(self.bits(arm)),
                f"{self.null(arm):.3f}", _mean([one["working"] for one in old], 1),
                _mean([d for d in (self.agreement(arm),) if d < float("inf")]), _mean(sums),
                _mean([one["accuracy"] for one in new]),
                _mean(self.bits(arm, NEW)), _mean([b for b in trained if b is not None]),
            ])  # fmt: skip
        title = "Reading maps: means over seeds (shuffled: the greatest upper end)"
        return Table(title, header, rows)

    def equal_table(self) -> Table:
        """The maps of runs that are as good on the longest walks of training."""

        def shown(names: Sequence[str], early: Sequence[Mapping[str, Any]]) -> list[str]:
            (arm,) = names
            own = Rules(self.claims, {arm: early})
            old, new = ([data["maps"][hops] for data in early] for hops in (OLD, NEW))
            return [
                _mean([one["accuracy"] for one in old]),
                _mean([one["loops"] for one in old], 1),
                _interval(own.bits(arm)),
                _mean([one["working"] for one in old], 1),
                f"{own.agreement(arm):.2f}",
                _mean([one["accuracy"] for one in new]),
                _mean(own.bits(arm, NEW)),
            ]

        return equal_accuracy.table(
            f"Reading maps at equal training accuracy: the first checkpoint with "
            f"{EQUAL_ACCURACY:g} of {OLD} hops",
            ["arm"],
            [
                *("8 hops", "loops", "bits", "working loops"),
                *("necessity and sufficiency differ", "10 hops", "bits at 10 hops"),
            ],
            [
                ([arm], [data["equal_accuracy"] for data in self.data[arm]])
                for arm in ARMS
                if ARMS[arm].trained and self.data[arm]
            ],
            shown,
        )

    def intervals_table(self) -> Table:
        """The map's numbers with what they vary by: over seeds, and over the examples of a seed."""
        header = ["arm", "bits over seeds", "bits over examples, by seed", "shuffled, by seed"]
        header += ["necessity and sufficiency differ", "column sum"]
        rows = []
        for arm in ARMS:
            maps = [data["maps"][OLD] for data in self.data[arm]]
            sums = [[n for n in one["necessity_sum"] if n is not None] for one in maps]
            apart = [float(np.mean(cells)) for cells in self.disagreements(arm) if cells]
            ends = [[one[name] for one in maps] for name in ("mean_interval", "null")]
            numbers = self.bits(arm), apart, [float(np.mean(each)) for each in sums if each]
            bits, differ, summed = map(_interval, numbers)
            examples, shuffled = ("; ".join(map(_range, each)) for each in ends)
            rows.append([arm, bits, examples, shuffled, differ, summed])
        return Table("Intervals of 95 % of the maps of 8 hops", header, [r for r in rows if r[2]])

    def signals_table(self) -> Table:
        """Novelty and operator difference by arm."""
        header = ["arm", "novelty", "the next loop's map instead", "at 10 loops", "at 32 loops"]
        rows = []
        for arm in ARMS:
            if not self.data[arm]:
                continue
            apart = [
                row[t + 1]
                for d in self.data[arm]
                for t, row in enumerate(d.get("operator", [[]])[:-1])
            ]
            many = [len(d.get("curve", ())) for d in self.data[arm]]
            left = [_mean(self.kept(arm, n)) if min(many) >= n else "" for n in (10, 32)]
            rows.append([arm, _mean(self.novelties(arm)), _mean(apart), *left])
        title = "Novelty, what a loop's number changes of its step, and accuracy left at many loops"
        return Table(title, header, rows)

    def growing_map(self) -> dict[str, Any]:
        """The first seed's maps: of loops on walks never trained, of the stack on trained ones."""
        found = {}
        for arm, hops in (("fixed", NEW), ("sampled", NEW), ("stack", OLD)):
            if self.data[arm]:
                one = self.data[arm][0]["maps"][hops]
                found[arm] = {
                    "hops": int(hops),
                    "rows": one["necessity"],
                    "accuracy": one["accuracy"],
                }
        return found

    def bits_by_arm(self) -> dict[str, Any]:
        """Bits of every seed by arm, and the upper ends of the nulls."""
        shown = [arm for arm in ARMS if self.data[arm]]
        return {arm: {"bits": self.bits(arm), "null": self.null(arm)} for arm in shown}


def _interval(values: Sequence[float]) -> str:
    """Mean and Student's interval over seeds."""
    if not values:
        return "none"
    found = t_interval(values)
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def _range(ends: Sequence[float] | None) -> str:
    return "none" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _mean(values: Sequence[float], digits: int = 2) -> str:
    return f"{np.mean(values):.{digits}f}" if len(values) else "none"
