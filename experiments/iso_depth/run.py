"""What is a loop worth in layers? Equal depth, fewer layers of their own.

A core of six layers is made of six, of three run twice, of two run three times, of one run six
times. All cost the same FLOPs per token; the law that is fitted says how much of a layer of its own
a loop stands for: phi 1 is as much, 0 is nothing.

Source: "How much is one recurrence worth?" (2604.21106), scaled down: there 16 layers of 20.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.claim import Claim, Conclusion, Decision, Table, Verdict, no_result
from experiments.docs_text import recipe, sizes_of, source_of, tiny, train_on_text
from experiments.interval import Interval, t_interval
from experiments.run_store import Result, Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from openmythos.config import ModelConfig
    from openmythos.plan.scaling_law import Fit

WIDTHS, LOOPS, DEPTH = (32, 64, 96), (1, 2, 3, 6), 6
STEPS, ROWS, SEQ_LEN = (50, 100, 200), 16, 128
ARMS = [f"w{width}_r{loops}" for width in WIDTHS for loops in LOOPS]
SEEDS, RATES = (0, 1, 2), (0.01, 0.02, 0.04)


class IsoDepth(Study):
    number = 14
    title = "What a loop is worth in layers (hours, on request)"
    scales = ("smoke", "full")
    page_scale = "full"

    def runs(self, scale: str, done: Results) -> list[Run]:
        """Rates after the fewest steps, then every number of steps."""
        if scale == "smoke":
            return [Run("w32_r3", 0, {"steps": 1, "batches": 1, "rate": RATES[1]})]
        found: list[Run] = []
        for arm in ARMS:
            short = {"steps": STEPS[0], "batches": 32}
            choice = tuned(done, arm, short, RATES, lambda r: -float(r.data["bits"]))
            found += choice.runs
            if choice.rate is not None:
                rest = {"batches": 32, "rate": choice.rate}
                found += [
                    Run(arm, seed, {"steps": steps, **rest}) for steps in STEPS for seed in SEEDS
                ]
        return found

    def measure(self, run: Run, scale: str, out: Path) -> dict[str, Any]:
        """Bits per byte at the loops of training."""
        from openmythos.train.validation import held_out_bits_per_byte

        loops = sizes_of(run.arm)[1]
        steps, rate = run.settings["steps"], run.settings["rate"]
        source = source_of(scale)
        config = recipe(model_of(run.arm), run.seed, steps, rate, source, SEQ_LEN, ROWS)
        model, held_out = train_on_text(config, out)
        bits = held_out_bits_per_byte(model, held_out, loops, run.settings["batches"])
        return {"bits": bits, "tokens": steps * ROWS * SEQ_LEN}

    def conclude(self, results: Results) -> Conclusion:
        fits = {seed: fitted(results, seed) for seed in SEEDS}
        return Conclusion(
            verdicts=[decide(self.claims["what-a-loop-is-worth"], fits)],
            tables=[fit_table(fits), loss_table(results)],
            figures={"by_loops": curves(results)},
        )

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.iso_depth.picture import draw

        return {"by_loops": draw(conclusion.figures["by_loops"])}


def model_of(arm: str) -> ModelConfig:
    """A layer before, six layers' worth of core, a layer behind."""
    width, loops = sizes_of(arm)
    return tiny(width, loops, DEPTH // loops)


# --- what the results say -------------------------------------------------------------------------


def fitted(results: Results, seed: int) -> Fit | None:
    """The law of a seed's runs; None if they do not determine it."""
    import numpy as np

    from openmythos.plan.scaling_law import UnidentifiedError, fit, sizes

    own = [r for arm in ARMS for r in results.of(arm) if r.run.seed == seed]
    parts = np.array([sizes(model_of(r.run.arm)) for r in own], dtype=float).reshape(-1, 2)
    columns = {
        "once": parts[:, 0],
        "loop": parts[:, 1],
        "num_loops": np.array([sizes_of(r.run.arm)[1] for r in own], dtype=float),
        "tokens": np.array([r.data["tokens"] for r in own], dtype=float),
        "loss": np.array([r.data["bits"] for r in own], dtype=float),
    }
    try:
        return fit("iso_depth", columns)
    except UnidentifiedError:
        return None


def decide(claim: Claim, fits: Mapping[int, Fit | None]) -> Verdict:
    """Whether loops are worth something, less than layers, and what was published."""
    phis = [found.values["phi"] for found in fits.values() if found is not None]
    if len(phis) < 2:
        return no_result(claim, "The runs of fewer than two seeds determine phi.")
    phi = t_interval(phis)
    published = claim.thresholds["published"]
    text = ", ".join(f"{loops} loops {loops**phi.mean:.1f}" for loops in LOOPS[1:])
    return Verdict(
        claim=claim.name,
        decision=judged(phi, published),
        sentence=f"Phi is {phi.mean:.2f}, published {published:g}; in times their layers: {text}.",
        number=phi.mean,
        interval=(phi.low, phi.high),
        figure="by_loops",
    )


def judged(phi: Interval, published: float) -> Decision:
    """The rule, for the interval of phi."""
    if phi.high <= 0 or phi.low >= 1:
        return "fails"
    if phi.low <= 0 or phi.high >= 1:
        return "no result"
    return "holds" if phi.low <= published <= phi.high else "in part"


def fit_table(fits: Mapping[int, Fit | None]) -> Table:
    """The constants of each seed's law; what is below a millionth is rounding, and shown as 0."""
    names = ["E", "A", "B", "a", "b", "phi"]
    rows = [
        [
            str(seed),
            *(f"{round(found.values[name], 6):.3g}" for name in names),
            f"{found.deviation:.4f}",
        ]
        for seed, found in fits.items()
        if found is not None
    ]
    header = ["seed", *names, "deviation around it, bits"]
    return Table("E + A (N_once + T^phi N_loop)^-a + B D^-b", header, rows)


def curves(results: Results) -> list[dict[str, Any]]:
    """Mean bits per byte by width, steps and loops."""
    cells: dict[tuple[int, int, int], list[Result]] = {}
    for result in (result for arm in ARMS for result in results.of(arm)):
        width, loops = sizes_of(result.run.arm)
        cells.setdefault((width, result.run.settings["steps"], loops), []).append(result)
    return [
        {
            "width": width,
            "steps": steps,
            "loops": loops,
            "bits": fmean(float(r.data["bits"]) for r in own),
            "seeds": len(own),
        }
        for (width, steps, loops), own in sorted(cells.items())
    ]


def loss_table(results: Results) -> Table:
    """Bits per byte by width and steps, a column per number of loops."""
    from openmythos.config import counts

    cells = {(row["width"], row["steps"], row["loops"]): row["bits"] for row in curves(results)}
    rows = []
    for width, steps in sorted({place[:2] for place in cells}):
        found = [cells.get((width, steps, loops)) for loops in LOOPS]
        shown = ["" if bits is None else f"{bits:.4f}" for bits in found]
        rows.append([str(width), str(steps), *shown])
    for width in WIDTHS if rows else ():
        sizes = [counts.total_params(model_of(f"w{width}_r{loops}")) for loops in LOOPS]
        rows.append([str(width), "parameters", *(f"{size:,}" for size in sizes)])
    header = ["width", "steps", "6 layers once", "3 twice", "2 three times", "1 six times"]
    return Table("Held-out text, bits per byte, means over seeds", header, rows)


STUDY = IsoDepth()

if __name__ == "__main__":
    main(STUDY)
