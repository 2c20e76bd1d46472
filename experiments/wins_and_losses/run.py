"""Same weights, same FLOPs: where loops win and where they lose."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import equal_accuracy
from experiments.claim import Claim, Conclusion, Decision, Table, Verdict, verdict
from experiments.interval import Gap, gap, t_interval
from experiments.matching import matching
from experiments.run_store import Result, Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS, ARMS = ("facts", "products", "induction"), ("loop", "shallow", "deep")
REASONING, RECALL = ("products", "induction"), "facts"
SEEDS, RATES = (0, 1, 2), (0.003, 0.01, 0.03)
STEPS = {"facts": 700, "products": 1000, "induction": 900}
SMOKE = dict(zip(TASKS, ARMS, strict=True))  # one arm per task
EXAMPLES = 1024  # of each size, held out
CONTEXT = {"facts": 2, "products": 8, "induction": 13}  # keys that a token sees, on average
Gaps = dict[str, Gap]


class WinsAndLosses(Study):
    number = 3
    title = "Same weights, same FLOPs: where loops win and where they lose"

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        found: list[Run] = []
        for task in TASKS:
            for arm in ARMS:
                name = f"{task}_{arm}"
                if scale == "smoke":
                    if arm == SMOKE[task]:
                        settings = {"steps": 2, "examples": 8, "rate": RATES[1]}
                        found.append(Run(name, 0, settings))
                    continue
                settings = {"steps": STEPS[task], "examples": EXAMPLES}
                choice = tuned(done, name, settings, RATES, score)
                found += choice.then(name, settings, SEEDS)
        return found

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        from experiments.wins_and_losses.arm import train_and_measure

        task, _, arm = run.arm.partition("_")
        return train_and_measure(arm, task, run.seed, dict(run.settings), run.tuning, out)

    def conclude(self, results: Results) -> Conclusion:
        scores = {
            task: {arm: [score(r) for r in results.of(f"{task}_{arm}")] for arm in ARMS}
            for task in TASKS
        }
        claims = self.claims
        complete = all(len(own) >= 2 for arms in scores.values() for own in arms.values())
        if not complete:
            verdicts = [
                Verdict(claim=name, decision="no result", sentence="Fewer than two seeds.")
                for name in claims
            ]
        else:
            same_weights = {task: gap(own["loop"], own["shallow"]) for task, own in scores.items()}
            same_flops = {task: gap(own["loop"], own["deep"]) for task, own in scores.items()}
            verdicts = [
                reaches(claims["six-layers-of-one"], same_flops, REASONING),
                reaches(claims["quality-of-kl-layers"], same_flops, TASKS),
                more_loops(claims["by-more-loops"], same_weights),
                wins_and_losses(claims["wins-and-losses"], same_weights, same_flops),
            ]
        return Conclusion(
            verdicts=verdicts,
            tables=[
                score_table(results),
                equal_table(results),
                leak_table(results),
                *matching_tables(),
            ],
            figures={"wins_and_losses": gaps_drawn(scores)},
        )

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.wins_and_losses.picture import draw_gaps

        return {"wins_and_losses": draw_gaps(conclusion.figures["wins_and_losses"])}


def score(result: Result) -> float:
    """Held-out accuracy, the mean over the sizes of training."""
    return float(result.data["accuracy"])


# --- verdicts -------------------------------------------------------------------------------------


def reaches(claim: Claim, same_flops: Gaps, tasks: Sequence[str]) -> Verdict:
    """On how many tasks the loop is at most a margin below the deep stack."""
    margin = claim.thresholds["margin"]
    near = [task for task in tasks if same_flops[task].difference.mean >= -margin]
    decision: Decision = "fails" if not near else "in part"
    decision = "holds" if len(near) == len(tasks) else decision
    worst = min(tasks, key=lambda task: same_flops[task].difference.mean)
    sentence = (
        f"The loop minus the stack of six layers, accuracy: {_said(same_flops, tasks)}; at most "
        f"{margin:g} below it on {len(near)} of {len(tasks)} tasks."
    )
    number = same_flops[worst].difference
    return verdict(claim.name, decision, sentence, number, figure="wins_and_losses")


def more_loops(claim: Claim, same_weights: Gaps) -> Verdict:
    """On how many reasoning tasks six loops are above one, with the same weights."""
    least = claim.thresholds["least_gap"]
    above = [task for task in REASONING if _is_above(same_weights[task], least)]
    decision: Decision = "fails" if not above else "in part"
    decision = "holds" if len(above) == len(REASONING) else decision
    if not any(same_weights[task].is_result for task in REASONING):
        decision = "no result"
    sentence = f"Six loops minus one, accuracy: {_said(same_weights, TASKS)}."
    least_task = min(REASONING, key=lambda task: same_weights[task].difference.mean)
    number = same_weights[least_task].difference
    return verdict(claim.name, decision, sentence, number, figure="wins_and_losses")


def wins_and_losses(claim: Claim, same_weights: Gaps, same_flops: Gaps) -> Verdict:
    """Wins at equal parameters on reasoning, and a loss at equal FLOPs on recall."""
    least = claim.thresholds["least_gap"]
    wins = all(_is_above(same_weights[task], least) for task in REASONING)
    lost = same_flops[RECALL]
    loses = lost.is_result and lost.difference.mean <= -least
    decision: Decision = "holds" if wins and loses else "in part" if wins or loses else "fails"
    sentence = (
        f"At equal parameters: {_said(same_weights, REASONING)}. At equal FLOPs on recall: "
        f"{_said(same_flops, (RECALL,))}."
    )
    return verdict(claim.name, decision, sentence, lost.difference, figure="wins_and_losses")


def _is_above(found: Gap, least: float) -> bool:
    return found.is_result and found.difference.mean >= least


def _said(gaps: Gaps, tasks: Sequence[str]) -> str:
    shown = (
        f"{task} {gaps[task].difference.mean:+.3f}"
        f"{'' if gaps[task].is_result else ' (within two seed deviations)'}"
        for task in tasks
    )
    return ", ".join(shown)


# --- tables and the figure's data -----------------------------------------------------------------


def score_table(results: Results) -> Table:
    """Accuracy by task and arm, the chosen rate, and the same on training examples."""
    rows = []
    for task in TASKS:
        for arm in ARMS:
            own = results.of(f"{task}_{arm}")
            if not own:
                continue
            trained = statistics.mean(float(r.data["trained"]) for r in own)
            sizes = {
                size: statistics.mean(float(r.data["by_size"][size]["held_out"]) for r in own)
                for size in own[0].data["by_size"]
            }
            by_size = ", ".join(f"{size}: {value:.3f}" for size, value in sizes.items())
            beyond = ", ".join(
                f"{name}: {statistics.mean(float(r.data['beyond'][name]) for r in own):.3f}"
                for name in own[0].data["beyond"]
            )
            seconds = statistics.mean(r.cpu_seconds for r in own)
            rows.append(
                [
                    *(task, arm, f"{own[0].run.settings['rate']:g}"),
                    *(str(t_interval([score(r) for r in own])), f"{trained:.3f}"),
                    *(by_size, beyond, f"{seconds:.0f}"),
                ]
            )
    header = ["task", "arm", "rate", "held out", "training", "by size"]
    header += ["longer than in training", "CPU seconds"]
    return Table("Accuracy, means over seeds, at equal steps", header, rows)


def equal_table(results: Results) -> Table:
    """What arms do that are as good on training examples, and what it took."""
    from experiments.wins_and_losses.arm import LEVELS, flops_of_training

    def shown(names: Sequence[str], early: Sequence[Mapping[str, Any]]) -> list[str]:
        task, _, arm = names
        steps = statistics.mean(one["step"] for one in early)
        flops = flops_of_training(arm, task, steps, CONTEXT[task])
        held_out = statistics.mean(one["accuracy"] for one in early)
        beyond = (
            f"{name}: {statistics.mean(one['beyond'][name] for one in early):.3f}"
            for name in early[0]["beyond"]
        )
        return [f"{flops / 1e12:.2f}", f"{held_out:.3f}", ", ".join(beyond)]

    return equal_accuracy.table(
        "At equal training accuracy: the first checkpoint that reaches it",
        ["task", "training accuracy", "arm"],
        ["training TFLOPs", "held out", "longer than in training"],
        [
            (
                [task, f"{level:g}", arm],
                [r.data["equal_accuracy"][str(level)] for r in results.of(f"{task}_{arm}")],
            )
            for task in TASKS
            for level in LEVELS[task]
            for arm in ARMS
        ],
        shown,
    )


def leak_table(results: Results) -> Table:
    """What guessers reach that do not do the work."""
    rows = []
    for task in TASKS:
        own = results.of(f"{task}_loop")
        for size, leaks in own[0].data["leaks"].items() if own else ():
            said = ", ".join(
                f"{name.replace('_', ' ')} {share:.3f}" for name, share in leaks.items()
            )
            rows.append([task, size, said])
    return Table("Leak baselines", ["task", "size", "guessers"], rows)


def matching_tables() -> list[Table]:
    """Parameters and FLOPs of the arms, by task."""
    from experiments.wins_and_losses.arm import size

    found = []
    for task in TASKS:
        table = matching({arm: size(arm, task) for arm in ARMS}, "loop", CONTEXT[task])
        found.append(Table(f"{task}: {table.title}", table.header, table.rows))
    return found


def gaps_drawn(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Differences of the loop to both stacks, by task, with intervals."""
    found = []
    for task, own in scores.items():
        for other in ("shallow", "deep"):
            if len(own["loop"]) < 2 or len(own[other]) < 2:
                continue
            between = gap(own["loop"], own[other])
            found.append(
                {
                    "task": task,
                    "against": other,
                    "gap": between.difference.mean,
                    "low": between.difference.low,
                    "high": between.difference.high,
                    "is_result": between.is_result,
                    "loop": statistics.mean(own["loop"]),
                    "other": statistics.mean(own[other]),
                }
            )
    return found


STUDY = WinsAndLosses()

if __name__ == "__main__":
    main(STUDY)
