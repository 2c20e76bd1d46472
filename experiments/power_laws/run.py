"""Does the best recurrence follow a power law of the budget?"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Claim, Conclusion, Decision, Table, Verdict, no_result
from experiments.docs_text import recipe, sizes_of, source_of, tiny, train_on_text
from experiments.power_laws.power_law import best_recurrence, power_law
from experiments.run_store import Result, Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS, RATES = (0, 1, 2), (0.01, 0.02, 0.04)
ROWS, SEQ_LEN, BATCHES = 16, 128, 32


@dataclass(frozen=True)
class Sweep:
    """Recurrences at every budget of training FLOPs of two widths."""

    budgets: Mapping[int, Sequence[float]]
    recurrences: Sequence[int]


SWEEPS = {
    "small": Sweep({32: (2e11, 4e11, 8e11), 64: (4e11, 8e11, 1.6e12)}, (1, 2, 4)),
    "full": Sweep(
        {96: (4e12, 8e12, 1.6e13, 3.2e13), 160: (1e13, 2e13, 4e13, 8e13)}, (1, 2, 3, 4, 6, 8)
    ),
}


class PowerLaws(Study):
    number = 9
    title = "Power laws of the best recurrence"
    scales = ("smoke", "small", "full")

    def runs(self, scale: str, done: Results) -> list[Run]:
        """Rates at the smallest budget of a width, then every budget."""
        if scale == "smoke":
            return [Run("w32_r2", 0, {"flops": 1e9, "batches": 1, "rate": RATES[1]})]
        found, sweep = list[Run](), SWEEPS[scale]
        for width, budgets in sweep.budgets.items():
            for loops in sweep.recurrences:
                arm, least = f"w{width}_r{loops}", {"flops": budgets[0], "batches": BATCHES}
                choice = tuned(done, arm, least, RATES, lambda r: -float(r.data["bits"]))
                found += choice.runs
                if choice.rate is not None:
                    found += [
                        Run(arm, seed, {**least, "flops": flops, "rate": choice.rate})
                        for flops in budgets
                        for seed in SEEDS
                    ]
        return found

    def measure(self, run: Run, scale: str, out: Path) -> dict[str, Any]:
        """Bits per byte at the recurrence of training, and how much text the budget bought."""
        from openmythos.train.validation import held_out_bits_per_byte

        width, loops = sizes_of(run.arm)
        steps, rate = steps_of(run.arm, run.settings["flops"]), run.settings["rate"]
        source = source_of(scale)
        config = recipe(tiny(width, loops), run.seed, steps, rate, source, SEQ_LEN, ROWS)
        model, held_out = train_on_text(config, out)
        bits = held_out_bits_per_byte(model, held_out, loops, run.settings["batches"])
        return {"bits": bits, "steps": steps, "tokens": steps * ROWS * SEQ_LEN}

    def conclude(self, results: Results) -> Conclusion:
        rows = points(results)
        return Conclusion(
            verdicts=[decide(self.claims["power-laws"], rows)],
            tables=[loss_table(rows)],
            figures={"recurrence": rows},
        )

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.power_laws.picture import draw

        return {"recurrence": draw(conclusion.figures["recurrence"])}


def steps_of(arm: str, flops: float) -> int:
    """As many steps as the FLOPs allow."""
    from openmythos.config import counts

    width, loops = sizes_of(arm)
    context = (SEQ_LEN + 1) // 2
    each = counts.training_flops(tiny(width, loops), num_loops=loops, context_length=context)
    return max(1, round(flops / (each * ROWS * SEQ_LEN)))


# --- what the results say -------------------------------------------------------------------------


def points(results: Results) -> list[dict[str, Any]]:
    """Mean bits per byte and tokens by width, budget and recurrence."""
    cells: dict[tuple[int, float, int], list[Result]] = {}
    for result in (result for arm in results.arms for result in results.of(arm)):
        width, loops = sizes_of(result.run.arm)
        cells.setdefault((width, result.run.settings["flops"], loops), []).append(result)
    return [
        {
            "width": width,
            "flops": flops,
            "loops": loops,
            "bits": statistics.mean(float(r.data["bits"]) for r in own),
            "tokens": float(own[0].data["tokens"]),
            "seeds": len(own),
        }
        for (width, flops, loops), own in sorted(cells.items())
    ]


def exponents(rows: Sequence[Mapping[str, Any]], width: int) -> dict[str, Any]:
    """The two power laws of a width, from the budgets whose best recurrence is inside."""
    budgets, best, tokens = [], [], []
    for flops in sorted({row["flops"] for row in rows if row["width"] == width}):
        own = [row for row in rows if row["width"] == width and row["flops"] == flops]
        found = best_recurrence({row["loops"]: row["bits"] for row in own})
        if found is not None:
            budgets.append(flops)
            best.append(found)
            nearest = min(own, key=lambda row: abs(row["loops"] - found))
            # FLOPs per token are linear in the loops: from the nearest, by their share.
            tokens.append(tokens_at(own, found, nearest))
    return {"recurrence": power_law(budgets, best), "tokens": power_law(budgets, tokens)}


def tokens_at(rows: Sequence[Mapping[str, Any]], loops: float, nearest: Mapping[str, Any]) -> float:
    """Tokens that the budget buys at this many loops; FLOPs per token are linear in them."""
    costs = [(row["loops"], row["flops"] / row["tokens"]) for row in rows]
    (low, cost), (high, more) = costs[0], costs[-1]
    each = cost + (more - cost) * (loops - low) / (high - low)
    return float(nearest["flops"] / each)


def decide(claim: Claim, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Power laws at both widths, with exponents that agree."""
    limit = claim.thresholds
    laws = {width: exponents(rows, width) for width in sorted({row["width"] for row in rows})}
    found = [law for each in laws.values() for law in each.values()]
    if len(laws) != 2 or any(law is None for law in found):
        return no_result(
            claim,
            "Fewer than three budgets of a width have their best recurrence inside the range that "
            f"was tried. {lowest_losses(rows)}",
        )
    narrow, wide = laws.values()
    gaps = {name: abs(narrow[name].exponent - wide[name].exponent) for name in narrow}
    straight = all(law.fit >= limit["least_fit"] for law in found)
    agree = [name for name, size in gaps.items() if size <= limit["most_difference"]]
    decision: Decision = "fails" if not straight or not agree else "in part"
    decision = "holds" if straight and len(agree) == len(gaps) else decision
    said = "; ".join(
        f"{name} {narrow[name].exponent:.2f} (R squared {narrow[name].fit:.2f}) and "
        f"{wide[name].exponent:.2f} ({wide[name].fit:.2f})"
        for name in narrow
    )
    return Verdict(
        claim=claim.name,
        decision=decision,
        sentence=f"Exponents at widths {' and '.join(map(str, laws))}: {said}.",
        number=wide["recurrence"].exponent,
        figure="recurrence",
    )


def lowest_losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """The recurrences with the lowest loss of a budget, and at how many budgets each has it."""
    budgets = sorted({(row["width"], row["flops"]) for row in rows})
    best = [
        min((row["bits"], row["loops"]) for row in rows if (row["width"], row["flops"]) == budget)
        for budget in budgets
    ]
    counted = Counter(loops for _, loops in best)
    shares = (
        f"at {count} with {loops} loop{'s' * (loops > 1)}" for loops, count in counted.items()
    )
    return f"Of {len(budgets)} budgets the loss is lowest {', '.join(shares)}."


def loss_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bits per byte by width, budget and recurrence."""
    shown = [
        [*(str(row["width"]), f"{row['flops']:.1e}", str(row["loops"])),
         *(f"{row['bits']:.4f}", f"{row['tokens']:,.0f}", str(row["seeds"]))]
        for row in rows
    ]  # fmt: skip
    header = ["width", "training FLOPs", "loops", "bits per byte", "tokens", "seeds"]
    return Table("Held-out text, means over seeds", header, shown)


STUDY = PowerLaws()

if __name__ == "__main__":
    main(STUDY)
