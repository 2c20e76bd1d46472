"""Does rho(A) < 1 keep the state finite? Fixed weights over 4,000 loops, then trainings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.bounded_state import verdicts
from experiments.claim import Conclusion, Table
from experiments.run_store import Results, Run
from experiments.study import Study, main

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("lti", "original_lti", "linear", "add", "gate", "none")
RHOS: dict[str, list[float | None]] = {
    "lti": [0.447, 0.9, 0.99, 0.999, 0.9999, 0.99999],
    "original_lti": [0.447, 0.9, 0.99, 0.999, 0.9999, 0.99999],
    "linear": [0.9, 1.0, 1.001, 1.05],
}
SCALES = [0.05, 1.0]  # of the entries of the core's matrices
SEEDS, RATES, TRAIN_LOOPS = (0, 1, 2), (1e-3, 4e-3, 1.6e-2), (4, 12)
STEPS = 500


class BoundedState(Study):
    number = 4
    title = "Does rho(A) < 1 keep the state finite?"
    fresh_seeds = (3, 4)

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        smoke = scale == "smoke"
        seeds, loops = ((0,), 20) if smoke else (SEEDS, 4000)
        found = [
            Run(
                f"fixed_{kind}",
                seed,
                {"rhos": RHOS.get(kind, [None]), "scales": SCALES, "loops": loops},
            )
            for kind in (("lti", "add") if smoke else KINDS)
            for seed in seeds
        ]
        cells = [(rate, loops) for rate in RATES for loops in TRAIN_LOOPS]
        return found + [
            Run(
                f"trained_{kind}",
                seed,
                {"rate": rate, "train_loops": loops, "steps": 2 if smoke else STEPS},
            )
            for kind in (("lti",) if smoke else KINDS)
            for rate, loops in (cells[:1] if smoke else cells)
            for seed in seeds
        ]

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        part, _, kind = run.arm.partition("_")
        if part == "trained":
            from experiments.bounded_state.trained import train_and_measure

            return train_and_measure(kind, run.seed, dict(run.settings), out)
        return self.at_fixed_weights(kind, run.seed, run.settings)

    def at_fixed_weights(
        self, kind: str, seed: int, settings: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Norms over the loops for each rho and scale."""
        from experiments.bounded_state.fixed import (
            INJECTIONS,
            bound,
            loops_shown,
            norms,
            random_model,
        )

        shown, rows = loops_shown(settings["loops"]), []
        for rho in settings["rhos"]:
            for scale in settings["scales"]:
                model = random_model(INJECTIONS[kind], scale, rho, seed)
                found = bound(model)
                rows.append(
                    {
                        "rho": rho,
                        "scale": scale,
                        "norms": norms(model, shown),
                        "bound": None if found is None else found["bound"],
                        "parts": found,
                    }
                )
        return {"shown": shown, "rows": rows}

    def conclude(self, results: Results) -> Conclusion:
        rows = verdicts.fixed_rows(results)
        return Conclusion(
            verdicts=[
                verdicts.lti_cannot_grow(self.claims["lti-cannot-grow"], results, rows),
                verdicts.blow_up(self.claims["activations-blow-up"], results, rows),
                verdicts.past_one(self.claims["past-one-breaks"], results, rows),
                verdicts.drifts(self.claims["drifts-into-noise"], results),
            ],
            tables=[fixed_table(rows), trained_table(results)],
            figures={"norms": curves(rows), "outcomes": outcomes(results)},
        )

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.bounded_state.picture import draw_norms, draw_outcomes

        figures = conclusion.figures
        return {
            "norms": draw_norms(figures["norms"]),
            "outcomes": draw_outcomes(figures["outcomes"]),
        }


def fixed_table(rows: verdicts.Rows) -> Table:
    """Norms at 100 and at the last loop, and the bound: means over seeds."""
    cells: dict[tuple[str, Any, float], verdicts.Rows] = {}
    for row in rows:
        cells.setdefault((row["kind"], row["rho"], row["scale"]), []).append(row)
    shown = []
    for (kind, rho, scale), own in cells.items():
        last = own[0]["shown"][-1]
        early, late = (
            statistics.mean(verdicts.norm_at(row, n) for row in own) for n in (100, last)
        )
        most = own[0]["bound"] and f"{statistics.mean(row['bound'] for row in own):,.3g}"
        label = "" if rho is None else f"{rho:g}"
        shown.append([kind, label, f"{scale:g}", f"{early:,.3g}", f"{late:,.3g}", most or "none"])
    header = ["injection", "rho", "weights times", "norm at 100", "norm at the last loop", "bound"]
    return Table("Fixed random weights: the largest norm of a state", header, shown)


def trained_table(results: Results) -> Table:
    """Accuracy and lost runs by injection, rate and trained loops."""
    shown = []
    for row in outcomes(results):
        mean = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        far = "not finite" if row["norm"] is None else f"{row['norm']:,.3g}"
        rho = "" if row["rho"] is None else f"{row['rho']:.4f}"
        runs = f"{row['lost']} of {row['runs']}"
        shown.append([row["kind"], f"{row['rate']:g}", str(row["loops"]), mean, runs, rho, far])
    header = [
        "injection",
        "rate",
        "loops",
        "accuracy",
        "lost",
        "rho at the end",
        "norm at 256 loops",
    ]
    return Table("Trained models, means over seeds; chance is 0.167", header, shown)


def curves(rows: verdicts.Rows) -> list[dict[str, Any]]:
    """Norms over loops of the first seed, small weights."""
    return [
        {"kind": row["kind"], "rho": row["rho"], "loops": row["shown"], "norms": row["norms"]}
        for row in rows
        if row["seed"] == 0 and row["scale"] == SCALES[0]
    ]


def outcomes(results: Results) -> list[dict[str, Any]]:
    """One row per injection, rate and trained loops."""
    found = []
    for kind in KINDS:
        own = [r for r in results if r.run.arm == f"trained_{kind}"]
        for cell in sorted({verdicts.cell_of(r) for r in own}):
            here = [r for r in own if verdicts.cell_of(r) == cell]
            done = [r for r in here if r.lost is None]
            norms = [r.data["norms"]["256"] for r in done]
            rhos = [r.data["rho"] for r in done if r.data["rho"] is not None]
            found.append(
                {
                    "kind": kind,
                    "rate": cell[0],
                    "loops": cell[1],
                    "runs": len(here),
                    "lost": len(here) - len(done),
                    "accuracy": statistics.mean(map(verdicts.trained_accuracy, done))
                    if done
                    else None,
                    "rho": statistics.mean(rhos) if rhos else None,
                    "norm": None if None in norms or not norms else statistics.mean(norms),
                }
            )
    return found


STUDY = BoundedState()

if __name__ == "__main__":
    main(STUDY)
