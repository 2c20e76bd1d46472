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
from experiments.depth_dial.arms import ARMS, MAIN, STACKS, TRAINED_HOPS, sizes
from experiments.depth_dial.grid import EXIT_HOPS, HOPS, MOST_CONFIDENT, RULES
from experiments.interval import gap, t_interval
from experiments.matching import matching
from experiments.run_store import Results

SAME = 0.01  # accuracies this close are the same: one point
SPARE = ("fixed_mixed", "sampled_longest", "sampled_mixed")  # trained with loops to spare
BASE = "fixed_longest"
LEARNT = 0.9  # of the trained lengths
PLAIN = (*MAIN, "every_loop")  # loops without positions and without targets on the way
# Where a rule says "the stack of equal ...", the best of these.
EQUAL_PARAMETERS = ("stack_parameters", "stack_parameters_rope")
EQUAL_TRAINING = ("stack_training", "stack_long", "stack_training_rope")
ROPE_STACK = "stack_training_rope"
# What a rule reads, by claim, if not the main arms; of a tuple one arm that has the seeds will do.
READS: Mapping[str, Sequence[str | tuple[str, ...]]] = {
    "keeps-going": (*PLAIN, STACKS),
    "vanilla-collapses": (BASE,),
    "more-loops": (*MAIN, EQUAL_PARAMETERS, EQUAL_TRAINING),
    "ends-at": PLAIN,
    "positions": (BASE, "rope", "drawn_positions"),
    "on-the-way": (BASE, "on_the_way"),
    "shortcuts": (BASE, "every_loop"),
    "stack-twice": (*PLAIN, STACKS),
    "like-for-like": ("rope", ROPE_STACK),
}


class Grids:
    """Accuracy of every arm by seed, hops and loops."""

    def __init__(self, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.loops = {arm: list(each[0]["loops"]) for arm, each in found.items() if each}
        self.accuracy = {
            arm: np.array([one["accuracy"] for one in each]) for arm, each in found.items() if each
        }

    def seeds(self, arm: str) -> int:
        """Number of seeds that the arm has."""
        return len(self.accuracy.get(arm, ()))

    def at(self, arm: str, hops: int, loops: int) -> list[float]:
        """Accuracy by seed."""
        values = self.accuracy[arm][:, HOPS.index(hops), self.loops[arm].index(loops)]
        return [float(value) for value in values]

    def mean(self, arm: str, hops: int, loops: int) -> float:
        """The mean over seeds."""
        return float(np.mean(self.at(arm, hops, loops)))

    def best_loops(self, arm: str, hops: int) -> int:
        """The fewest loops whose mean accuracy is within a point of the best; for all seeds."""
        means = self.accuracy[arm][:, HOPS.index(hops)].mean(axis=0)
        return self.loops[arm][int(np.argmax(means >= means.max() - SAME))]

    def best(self, arm: str, hops: int) -> list[float]:
        """Accuracy by seed at ``best_loops``."""
        return self.at(arm, hops, self.best_loops(arm, hops))

    def reach(self, arm: str, least: float) -> list[float]:
        """By seed: the most hops up to which every even length from 8 on is answered; 0 if none is.

        A length is answered if the accuracy at its best loops is at least ``least``. Odd ones are
        left out: the longest walks in training are of eight hops, and a loop takes two.
        """
        found = []
        for seed in range(self.seeds(arm)):
            reached = 0
            for hops in (h for h in HOPS if h >= TRAINED_HOPS and h % 2 == 0):
                if self.best(arm, hops)[seed] < least:
                    break
                reached = hops
            found.append(float(reached))
        return found


def conclude(claims: Mapping[str, Claim], results: Results) -> Conclusion:
    """The conclusion from the stored results; no verdict where a rule's arm has too few seeds."""
    data = {arm: [result.data for result in results.of(arm)] for arm in ARMS}
    found = Rules(claims, data)
    verdicts = [found.decide(name) for name in claims]
    return Conclusion(
        verdicts=verdicts,
        tables=[*found.tables(results), matching(sizes(), BASE, context_length=TRAINED_HOPS + 1)],
        figures={
            "stepping_and_holding": found.heat_maps((BASE, "sampled_mixed")),
            "spare_from_one": found.heat_maps(("fixed_mixed", "sampled_longest")),
            "reach": found.curves(),
        },
    )


class Rules:
    """One method per claim, named as the claim."""

    def __init__(
        self, claims: Mapping[str, Claim], data: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        self.claims, self.data, self.grids = claims, data, Grids(data)
        early = {arm: [d["equal_accuracy"] for d in each] for arm, each in data.items()}
        self.early = Grids({arm: [e for e in each if e] for arm, each in early.items()})

    def decide(self, name: str) -> Verdict:
        """The verdict on a claim."""
        rule: Callable[[Mapping[str, float]], Found] = getattr(self, name.replace("-", "_"))
        read = (arms if isinstance(arms, tuple) else (arms,) for arms in READS.get(name, MAIN))
        seeds = {" or ".join(arms): max(map(self.grids.seeds, arms)) for arms in read}
        spares = ("spare_loops", "degrades", "dial")
        figure = "stepping_and_holding" if name.replace("-", "_") in spares else "reach"
        return by_rule(self.claims[name], rule, seeds, figure)

    def furthest(self, arms: Sequence[str], hops: int) -> str:
        """The arm with the highest mean accuracy at its best loops, of those with the seeds."""
        enough = [arm for arm in arms if self.grids.seeds(arm) >= MIN_SEEDS]
        return max(enough, key=lambda arm: float(np.mean(self.grids.best(arm, hops))))

    def score(self, arm: str, hops: int) -> str:
        """Mean accuracy at the best loops, as text."""
        return f"{np.mean(self.grids.best(arm, hops)):.2f}"

    def keeps_going(self, limits: Mapping[str, float]) -> Found:
        """Train on short walks, test on long ones with more loops."""
        near, far = int(limits["near_hops"]), int(limits["far_hops"])
        arm = self.furthest(PLAIN, near)
        stack = self.furthest(STACKS, near)
        at_near, at_far = t_interval(self.grids.best(arm, near)), self.grids.best(arm, far)
        above = gap(self.grids.best(arm, near), self.grids.best(stack, near))
        stack_far = float(np.mean(self.grids.best(stack, far)))
        said = (
            f"{arm} answers {at_near.mean:.2f} of {near} hops "
            f"({self.grids.best_loops(arm, near)} loops) and {np.mean(at_far):.2f} of {far}; "
            f"the best stack, {stack}, {self.score(stack, near)} and {stack_far:.2f}."
            f"{self._with_positions(near, far)}"
        )
        decision: Decision = "fails"
        wins = above.is_result and above.difference.mean > 0
        if at_near.mean >= limits["answered"] and wins:
            far_too = float(np.mean(at_far)) >= limits["answered"]
            decision = "holds" if far_too and stack_far <= limits["collapsed"] else "in part"
        return decision, t_interval(at_far), said

    def vanilla_collapses(self, limits: Mapping[str, float]) -> Found:
        """At equal training accuracy, beyond the trained length."""
        near = int(limits["near_hops"])
        stack = max(EQUAL_TRAINING, key=self.early.seeds)
        if min(self.early.seeds(stack), self.early.seeds(BASE)) < MIN_SEEDS:
            none = t_interval([float(self.early.seeds(stack))])
            return (
                "not decidable here",
                none,
                f"Only {self.early.seeds(stack)} runs of {stack} and {self.early.seeds(BASE)} of "
                f"{BASE} reached the training accuracy at which arms are compared.",
            )
        loop, plain = self.early.best(BASE, near), self.early.best(stack, near)
        found = gap(loop, plain)
        said = (
            f"At equal training accuracy {BASE} answers {np.mean(loop):.2f} of {near} hops, "
            f"{stack} {np.mean(plain):.2f}."
        )
        if stack == ROPE_STACK and self.early.seeds("rope") >= MIN_SEEDS:
            alike = np.mean(self.early.best("rope", near))
            said += (
                f" Stacks without positions never reached it; a loop with the same positions "
                f"answers {alike:.2f}."
            )
        if not found.is_result:
            return "no result", found.difference, said
        collapsed = np.mean(plain) <= limits["collapsed"]
        passed = np.mean(loop) >= limits["answered"]
        decision: Decision = "holds" if collapsed and passed else "in part"
        return ("fails" if found.difference.mean < 0 else decision), found.difference, said

    def degrades(self, limits: Mapping[str, float]) -> Found:
        """Accuracy on the longest trained walks at the best loops minus that at twice 8 loops."""
        drops = self._drops(int(limits["many_loops"]))
        falls = [
            arm
            for arm, drop in drops.items()
            if (i := t_interval(drop)).mean >= limits["least_drop"] and i.low > 0
        ]
        said = ", ".join(f"{arm} {np.mean(drop):.2f}" for arm, drop in drops.items())
        most = max(drops.values(), key=lambda drop: float(np.mean(drop)))
        return (
            graded(arm in falls for arm in MAIN),
            t_interval(most),
            f"Lost from the best to 16 loops: {said}.",
        )

    def _drops(self, many: int) -> dict[str, list[float]]:
        found = {}
        for arm in MAIN:
            best, last = self.grids.best(arm, TRAINED_HOPS), self.grids.at(arm, TRAINED_HOPS, many)
            found[arm] = [a - b for a, b in zip(best, last, strict=True)]
        return found

    def near_ceiling(self, limits: Mapping[str, float]) -> Found:
        """Accuracy on the longest trained walks at twenty loops, as a share of the best."""
        many, shares = int(limits["loops"]), {}
        for arm in MAIN:
            best, last = self.grids.best(arm, TRAINED_HOPS), self.grids.at(arm, TRAINED_HOPS, many)
            shares[arm] = [b / max(a, 1e-9) for a, b in zip(best, last, strict=True)]
        near = [arm for arm, share in shares.items() if np.mean(share) >= limits["least_share"]]
        least = min(shares.values(), key=lambda share: float(np.mean(share)))
        said = ", ".join(f"{arm} {np.mean(share):.2f}" for arm, share in shares.items())
        return (
            graded(arm in near for arm in MAIN),
            t_interval(least),
            f"At {many} loops, of the best: {said}.",
        )

    def jumps_around(self, limits: Mapping[str, float]) -> Found:
        """Walks whose answer loses log-probability on the way to being right."""
        shares = {
            arm: [d["falls"]["share"] for d in self.data[arm] if d["falls"]["share"] is not None]
            for arm in MAIN
        }
        known = {arm: share for arm, share in shares.items() if len(share) >= MIN_SEEDS}
        if not known:
            return "not decidable here", t_interval([0.0]), "No arm answers the trained walks."
        jumpy = [arm for arm, share in known.items() if np.mean(share) >= limits["least_share"]]
        most = max(known.values(), key=lambda share: float(np.mean(share)))
        said = ", ".join(f"{arm} {np.mean(share):.2f}" for arm, share in known.items())
        return (
            graded(arm in jumpy for arm in known),
            t_interval(most),
            f"Walks whose answer fell back on the way: {said}.",
        )

    def exits_prevent(self, limits: Mapping[str, float]) -> Found:
        """What an exit rule loses against the best fixed loops of each length."""
        drops = self._drops(int(limits["many_loops"]))
        bad = [arm for arm, drop in drops.items() if np.mean(drop) >= limits["least_drop"]]
        if not bad:
            return "not decidable here", t_interval([0.0]), "No arm degrades with surplus loops."
        losses = {rule: {arm: self.exit_loss(arm, rule) for arm in bad} for rule in RULES}
        worst = {
            rule: max(each.values(), key=lambda loss: float(np.mean(loss)))
            for rule, each in losses.items()
        }
        best = min(worst, key=lambda rule: float(np.mean(worst[rule])))
        kept = [
            arm
            for arm in bad
            if min(np.mean(losses[rule][arm]) for rule in RULES) <= limits["most_lost"]
        ]
        decision: Decision = "in part" if kept else "fails"
        decision = "holds" if np.mean(worst[best]) <= limits["most_lost"] else decision
        said = (
            f"Of {len(RULES)} rules, {best} loses least, at worst {np.mean(worst[best]):.2f}; arms "
            f"that degrade: {', '.join(bad)}; of these some rule loses at most "
            f"{limits['most_lost']:g} in: {', '.join(kept) or 'none'}."
        )
        return decision, t_interval(worst[best]), said

    def exit_loss(self, arm: str, rule: str) -> list[float]:
        """By seed: accuracy that a rule loses against the best loops, mean over 4 to 10 hops."""
        found = []
        for seed, data in enumerate(self.data[arm]):
            lost = [
                self.grids.best(arm, hops)[seed] - data["exits"][rule]["accuracy"][place]
                for place, hops in enumerate(EXIT_HOPS)
                if 4 <= hops <= 10
            ]
            found.append(float(np.mean(lost)))
        return found

    def dial(self, limits: Mapping[str, float]) -> Found:
        """Whether loops can be chosen at run time: more for longer walks, and none too many."""
        lengths, many = (2, 4, 6, 8), int(limits["many_loops"])
        turned, held = [], {}
        for arm in MAIN:
            needed = {hops: self.grids.best_loops(arm, hops) for hops in lengths}
            answers = min(np.mean(self.grids.best(arm, hops)) for hops in lengths)
            if needed[8] > needed[2] and answers >= limits["answered"]:
                turned.append(arm)
            rows = [
                np.min([self.grids.at(arm, h, n) for n in range(needed[h], many + 1)], axis=0)
                for h in lengths
            ]
            held[arm] = np.min(rows, axis=0).tolist()
        both = [arm for arm in turned if np.mean(held[arm]) >= limits["answered"]]
        decision: Decision = "holds" if both else "in part" if turned else "fails"
        best = max(held.values(), key=lambda values: float(np.mean(values)))
        said = (
            f"Longer walks need more loops and are answered in: {', '.join(turned) or 'no arm'}; "
            f"at least {limits['answered']:g} of every length stays right up to {many} loops in: "
            f"{', '.join(both) or 'none of them'}."
        )
        return decision, t_interval(best), said

    def more_loops(self, limits: Mapping[str, float]) -> Found:
        """The longest trained walks: loops against a stack of as many and of more parameters."""
        arm = self.furthest(MAIN, TRAINED_HOPS)
        own = self.grids.best(arm, TRAINED_HOPS)
        equal_stack = self.furthest(EQUAL_PARAMETERS, TRAINED_HOPS)
        large_stack = self.furthest(EQUAL_TRAINING, TRAINED_HOPS)
        equal = gap(own, self.grids.best(equal_stack, TRAINED_HOPS))
        large = float(np.mean(self.grids.best(large_stack, TRAINED_HOPS)))
        wins = equal.is_result and equal.difference.mean >= limits["least_gap"]
        decision: Decision = "fails"
        if wins:
            decision = "holds" if np.mean(own) >= large - SAME else "in part"
        said = (
            f"{arm} answers {np.mean(own):.2f} of 8 hops, the stack of as many parameters "
            f"({equal_stack}) {self.score(equal_stack, TRAINED_HOPS)}, that of 3.8 times "
            f"as many ({large_stack}) {large:.2f}."
        )
        return decision, equal.difference, said

    def spare_loops(self, limits: Mapping[str, float]) -> Found:
        """Stepping against holding."""
        many, far = int(limits["many_loops"]), int(limits["far_hops"])
        holds, costs, met = {}, {}, 0
        for arm in SPARE:
            last = (self.grids.at(name, TRAINED_HOPS, many) for name in (arm, BASE))
            holds[arm] = gap(*last)
            costs[arm] = gap(self.grids.best(BASE, far), self.grids.best(arm, far))
            met += holds[arm].is_result and holds[arm].difference.mean >= limits["least_hold"]
            met += costs[arm].is_result and costs[arm].difference.mean >= limits["least_cost"]
        decision: Decision = "holds" if met == 6 else "in part" if met >= 3 else "fails"
        least = min(holds.values(), key=lambda found: found.difference.mean)
        held = ", ".join(f"{arm} {g.difference.mean:+.2f}" for arm, g in holds.items())
        cost = ", ".join(f"{arm} {g.difference.mean:+.2f}" for arm, g in costs.items())
        said = (
            f"8 hops at {many} loops, above {BASE}: {held}. {far} hops at the best loops, {BASE} "
            f"above: {cost}. {met} of 6 comparisons pass."
        )
        return decision, least.difference, said

    def sampled_dial(self, limits: Mapping[str, float]) -> Found:
        """Random depth against fixed depth, on walks beyond the trained."""
        near = int(limits["near_hops"])
        found = gap(self.grids.best("sampled_mixed", near), self.grids.best("fixed_mixed", near))
        said = (
            f"{near} hops: {self.score('sampled_mixed', near)} with sampled depth, "
            f"{self.score('fixed_mixed', near)} with fixed depth."
        )
        return by_gap(found, limits["least_gap"], said)

    def ends_at(self, limits: Mapping[str, float]) -> Found:
        """Where extrapolation ends."""
        half, twelve, fourteen, sixteen = limits["half"], 12, 14, 16
        arm = self.furthest(PLAIN, twelve)
        means = {
            hops: max(float(np.mean(self.grids.best(a, hops))) for a in PLAIN)
            for hops in (twelve, fourteen, sixteen)
        }
        decision: Decision = "fails"
        if means[sixteen] < half:
            ends = means[twelve] >= half > means[fourteen]
            decision = "holds" if ends else "in part"
        said = "The best arm at " + ", ".join(f"{h} hops: {m:.2f}" for h, m in means.items())
        reach = t_interval(self.grids.reach(arm, half))
        said += f". {arm} answers half up to {reach.mean:.1f} hops."
        return decision, reach, said + self._with_positions(fourteen, sixteen)

    def _with_positions(self, *hops: int) -> str:
        """What rules about models without positions leave out: the same with rotary ones."""
        if not self.grids.seeds("rope"):
            return ""
        found = " and ".join(f"{self.score('rope', h)} of {h}" for h in hops)
        return (
            f" These loops have no positions; with rotary ones fixed_longest answers {found} hops."
        )

    def positions(self, limits: Mapping[str, float]) -> Found:
        """Drawn positions against none and against plain ones."""
        far = int(limits["far_hops"])
        drawn = self.grids.best("drawn_positions", far)
        gaps = {arm: gap(drawn, self.grids.best(arm, far)) for arm in (BASE, "rope")}
        least = min(gaps.values(), key=lambda found: found.difference.mean)
        learnt = float(np.mean(self.grids.best("drawn_positions", TRAINED_HOPS)))
        said = (
            f"{far} hops: {np.mean(drawn):.2f} with drawn positions, "
            f"{self.score('rope', far)} with plain ones, "
            f"{self.score(BASE, far)} without; 8 hops with drawn ones: "
            f"{learnt:.2f}."
        )
        if learnt < limits["answered"]:
            return "not decidable here", least.difference, said
        above = all(g.is_result and g.difference.mean > 0 for g in gaps.values())
        decision: Decision = "in part" if above else "fails"
        decision = "holds" if above and least.difference.mean >= limits["least_gap"] else decision
        return decision, least.difference, said

    def on_the_way(self, limits: Mapping[str, float]) -> Found:
        """Targets on the way against the answer alone."""
        far, twelve = int(limits["far_hops"]), 12
        found = self.grids.best("on_the_way", far)
        above = gap(self.grids.best("on_the_way", twelve), self.grids.best(BASE, twelve))
        said = (
            f"{far} hops: {np.mean(found):.2f}; 12 hops: "
            f"{self.score('on_the_way', twelve)} against "
            f"{self.score(BASE, twelve)} without them."
        )
        decision: Decision = "holds" if np.mean(found) >= limits["answered"] else "fails"
        if decision == "fails" and above.is_result and above.difference.mean > 0:
            decision = "in part"
        return decision, t_interval(found), said

    def shortcuts(self, limits: Mapping[str, float]) -> Found:
        """A loss at every loop against one at the last."""
        near = int(limits["near_hops"])
        found = gap(self.grids.best(BASE, near), self.grids.best("every_loop", near))
        said = (
            f"{near} hops: {self.score(BASE, near)} with the last loop's loss, "
            f"{self.score('every_loop', near)} with a loss at every loop."
        )
        learnt = float(np.mean(self.grids.best("every_loop", TRAINED_HOPS)))
        if learnt < LEARNT:
            said += (
                f" That arm answers {learnt:.2f} of {TRAINED_HOPS} hops, which it was trained on: "
                "it did not learn the task, so that this shows no shortcut."
            )
        return by_gap(found, limits["least_gap"], said)

    def stack_twice(self, limits: Mapping[str, float]) -> Found:
        """A plain stack that goes on from its own answer."""
        far = int(limits["far_hops"])
        stack = self.furthest(STACKS, TRAINED_HOPS)
        place = HOPS.index(far)
        passes = [data["twice"][place] for data in self.data[stack]]
        arm = self.furthest(PLAIN, far)
        found = gap(passes, self.grids.best(arm, far))
        said = (
            f"{far} hops: {stack} in two passes {np.mean(passes):.2f}, in one "
            f"{self.score(stack, far)}; {arm} {self.score(arm, far)}. Two passes by hops: "
            f"{self._twice_by_hops(stack)}."
        )
        halves = self.grids.best(stack, far // 2)
        if np.mean(halves) < limits["answered"]:
            short = f" It answers {np.mean(halves):.2f} of the {far // 2} hops of one pass."
            return "not decidable here", found.difference, said + short
        if found.difference.mean >= -SAME:
            return "holds", found.difference, said
        own = gap(passes, self.grids.best(stack, far))
        better = own.is_result and own.difference.mean > 0
        return ("in part" if better else "fails"), found.difference, said

    def _twice_by_hops(self, stack: str) -> str:
        """Two passes of four hops and more, of which only twice a pass's own length is decided."""
        means = np.mean([data["twice"] for data in self.data[stack]], axis=0)
        by_hops = zip(HOPS, means, strict=True)
        return ", ".join(f"{h}: {m:.2f}" for h, m in by_hops if h in (4, 8, 10, 12, 14, 16, 20))

    def like_for_like(self, limits: Mapping[str, float]) -> Found:
        """Loops against a stack of as many training FLOPs, both with rotary positions."""
        far = int(limits["far_hops"])
        found = gap(self.grids.best("rope", far), self.grids.best(ROPE_STACK, far))
        said = (
            f"{far} hops: loops {self.score('rope', far)}, the stack "
            f"{self.score(ROPE_STACK, far)}; 8 hops: {self.score('rope', TRAINED_HOPS)} and "
            f"{self.score(ROPE_STACK, TRAINED_HOPS)}."
        )
        return by_gap(found, limits["least_gap"], said)

    # --- tables and figures -----------------------------------------------------------------------

    def tables(self, results: Results) -> list[Table]:
        """Accuracy at equal steps and at equal training accuracy, exits, leaks."""
        hops = (8, 10, 12, 14, 16)
        known = [arm for arm in ARMS if self.grids.seeds(arm)]
        header = ["arm", "what", *(f"{h} hops (loops)" for h in hops)]
        rows = [[arm, ARMS[arm].says, *self._cells(self.grids, arm, hops)] for arm in known]
        steps = Table("Accuracy at equal steps, at the best loops", header, rows)
        equal = equal_accuracy.table(
            "Accuracy at equal training accuracy: the first checkpoint with 0.90 of 8 hops",
            ["arm"],
            [f"{h} hops (loops)" for h in hops],
            [([arm], [data["equal_accuracy"] for data in self.data[arm]]) for arm in known],
            lambda names, _: self._cells(self.early, names[0], hops),
        )
        odd = (3, 5, 7, 9, 11, 13)
        header = ["arm", *(f"{h} hops (loops)" for h in odd)]
        rows = [[arm, *self._cells(self.grids, arm, odd)] for arm in known]
        lengths = Table("Odd lengths, at the best loops", header, rows)
        return [steps, equal, lengths, self._exit_table(), _leak_table(results)]

    def _cells(self, grids: Grids, arm: str, hops: Sequence[int]) -> list[str]:
        found = [(t_interval(grids.best(arm, h)), grids.best_loops(arm, h)) for h in hops]
        return [f"{i.mean:.2f} ± {i.deviation:.2f} ({loops})" for i, loops in found]

    def _exit_table(self) -> Table:
        looped = [arm for arm in ARMS if arm not in STACKS and self.grids.seeds(arm)]
        rows = []
        for rule in (*RULES, MOST_CONFIDENT):
            cells = []
            for arm in looped:
                lost = float(np.mean(self.exit_loss(arm, rule)))
                loops = np.mean([d["exits"][rule]["loops"] for d in self.data[arm]])
                cells.append(f"{lost:.2f} ({loops:.1f})")
            rows.append([rule, *cells])
        name = "What exit rules lose, 4 to 10 hops, against the best fixed loops (mean loops)"
        return Table(name, ["rule", *looped], rows)

    def heat_maps(self, arms: Sequence[str]) -> dict[str, Any]:
        """Mean accuracy by hops and loops."""
        shown = [arm for arm in arms if self.grids.seeds(arm)]
        return {
            "hops": list(HOPS),
            "loops": self.grids.loops[shown[0]] if shown else [],
            "accuracy": {arm: self.grids.accuracy[arm].mean(axis=0).tolist() for arm in shown},
        }

    def curves(self) -> dict[str, Any]:
        """Accuracy at the best loops by hops: mean, and least and greatest over seeds."""
        found = {}
        for arm in ARMS:
            if self.grids.seeds(arm):
                values = np.array([self.grids.best(arm, hops) for hops in HOPS])
                found[arm] = [values.mean(axis=1), values.min(axis=1), values.max(axis=1)]
        return {"hops": list(HOPS), "arms": {k: [c.tolist() for c in v] for k, v in found.items()}}


def _leak_table(results: Results) -> Table:
    each = [result.data["leaks"] for result in results if result.lost is None]
    names = list(each[0]) if each else []
    rows = [[name, f"{max(one[name] for one in each):.4f}"] for name in names]
    return Table(
        "The best guessers that do not follow the walk, any seed", ["guesser", "accuracy"], rows
    )
