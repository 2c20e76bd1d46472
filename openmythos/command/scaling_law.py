"""``openmythos scaling-law``: laws of the loss, fitted to runs; the runs behind a published law."""

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from openmythos.command.option import AsJson, Seed
from openmythos.command.table import number_table
from openmythos.config.schema import as_number, require
from openmythos.folder import write_whole
from openmythos.terminal import console, note, print_table

if TYPE_CHECKING:
    from openmythos.plan.scaling_law import Fit, Runs

LEAST_RESAMPLES = 20  # of fewer, a 90% interval has no sample outside
MEANINGS = {
    "phi": "what a loop is worth: T loops stand for T^phi layers",
    "z": "how fast loops at test time stop to help",
}


def scaling_law(
    action: Annotated[
        Literal["fit", "simulate"],
        typer.Argument(help="fit laws to RUNS; or simulate the runs behind a published law."),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUNS...",
            help="fit: run folders, or one .csv or .jsonl table with the columns once, loop, "
            "num_loops, tokens, loss and perhaps test_loops. simulate: parcae-140m or parcae-370m.",
        ),
    ] = None,
    law: Annotated[
        str | None,
        typer.Option(help="unrolled, iso_depth, test_time or unified; default: what can be fit."),
    ] = None,
    resamples: Annotated[
        int,
        typer.Option(help="Bootstrap samples of the 90% intervals, 20 and more; 0: none.", min=0),
    ] = 400,
    plot: Annotated[Path | None, typer.Option(help="Draw the fits into this file.")] = None,
    noise: Annotated[
        float, typer.Option(help="simulate: standard deviation of the losses.", min=0.0)
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="simulate: the table's file, .csv.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit laws of the loss to runs: size, data, loops in training and at test time.

    N_once and N_loop are multiply-adds with weights per token outside and inside the loop.
    """
    note("reading the runs ..." if action == "fit" else "simulating ...")
    if action == "simulate":
        _simulate(sources or [], noise, seed, out, as_json)
        return
    from openmythos.plan import run_table
    from openmythos.plan.scaling_law import LAWS, UnidentifiedError, fit

    if not sources:
        raise ValueError("give RUNS: run folders, or a .csv or .jsonl table of runs")
    enough = resamples == 0 or resamples >= LEAST_RESAMPLES
    require(enough, "--resamples", resamples, f"0 or at least {LEAST_RESAMPLES}")
    runs = run_table.read_runs([Path(name) for name in sources])
    fits: dict[str, Fit] = {}
    refused: dict[str, str] = {}
    for name in LAWS if law is None else [law]:
        try:
            fits[name] = fit(name, runs, resamples=resamples, seed=seed)
        except UnidentifiedError as error:
            refused[name] = str(error)
    if not fits:
        raise ValueError("; ".join(refused.values()))
    if plot is not None:
        from openmythos.analysis.picture import save
        from openmythos.report.picture import laws

        save(laws(fits, runs), plot)
    if as_json:
        print(json.dumps(_report(fits, refused, runs), indent=2))
    else:
        _print(fits, refused, runs)


def _optima(found: "Fit", runs: "Runs") -> list[dict[str, Any]]:
    """The optimum between the least and the most compute of the runs, by convention of FLOPs."""
    import numpy as np

    from openmythos.plan.scaling_law import FLOPS, optimum

    optima = []
    once, loop = (float(np.median(runs[name])) for name in ("once", "loop"))
    for convention, flops in FLOPS.items():
        compute = runs["tokens"] * flops(once, loop, runs["num_loops"])
        ends = float(compute.min()), float(compute.max())
        if not loop or ends[0] == ends[1]:
            continue
        best = optimum(found, once=once, loop=loop, compute=ends, convention=convention)
        optima.append(
            {
                "convention": convention,
                "compute": best.compute.tolist(),
                "loops": best.loops.tolist(),
                "tokens": best.tokens.tolist(),
                "loops_exponent": best.loops_exponent,
                "tokens_exponent": best.tokens_exponent,
            }
        )
    return optima


def _report(fits: "dict[str, Fit]", refused: dict[str, str], runs: "Runs") -> dict[str, Any]:
    """What ``scaling-law fit --json`` prints."""
    from openmythos.plan.scaling_law import LAWS

    return {
        "laws": {
            name: {
                "formula": LAWS[name].formula,
                "values": found.values,
                "intervals": found.intervals,
                "deviation": found.deviation,
                "num_losses": found.num_runs,
            }
            for name, found in fits.items()
        },
        "refused": refused,
        "optimum": _optima(fits["unrolled"], runs) if "unrolled" in fits else [],
    }


def _print(fits: "dict[str, Fit]", refused: dict[str, str], runs: "Runs") -> None:
    from openmythos.plan.scaling_law import LAWS

    screen = console()
    for name, found in fits.items():
        spread = f"{found.deviation:.2g} around it" if found.deviation else "no loss to spare"
        title = f"{name}: L = {LAWS[name].formula} ({found.num_runs} losses, {spread})"
        table = number_table("constant", "value", "90% interval", title=title)
        for constant, value in found.values.items():
            low, high = found.intervals.get(constant, (None, None))
            between = "-" if low is None else f"{low:.4g} to {high:.4g}"
            table.add_row(constant, f"{value:.4g}", between)
        print_table(screen, table)
        meant = [f"{key}: {said}" for key, said in MEANINGS.items() if key in found.values]
        if meant:
            screen.print("; ".join(meant))
        screen.print()
    for said in refused.values():
        screen.print(f"not fitted: {said}")
    if "unrolled" in fits and (optima := _optima(fits["unrolled"], runs)):
        screen.print()
        title = "The optimum of unrolled: loops T* ~ C^x and tokens D* ~ C^y, C FLOPs of training"
        table = number_table("FLOPs per token", "x", "y", "T* from", "to", title=title)
        for best in optima:
            table.add_row(
                best["convention"],
                f"{best['loops_exponent']:.2f}",
                f"{best['tokens_exponent']:.2f}",
                f"{best['loops'][0]:.1f}",
                f"{best['loops'][-1]:.1f}",
            )
        print_table(screen, table)


def _simulate(sources: list[str], noise: float, seed: int, out: Path | None, as_json: bool) -> None:
    from openmythos.config.presets import preset
    from openmythos.plan.scaling_law import PARCAE, simulate

    if len(sources) != 1 or sources[0] not in PARCAE:
        raise ValueError(f"simulate is given {sources}; give one of {', '.join(PARCAE)}")
    as_number("--noise", noise, "a number")
    published = PARCAE[sources[0]]
    runs = simulate(published, preset(published.preset), noise=noise, seed=seed)
    rows = [
        dict(zip(runs, values, strict=True))
        for values in zip(*(column.tolist() for column in runs.values()), strict=True)
    ]
    if out is not None:
        text = io.StringIO()
        table = csv.DictWriter(text, list(runs), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_whole(out, text.getvalue())
    said = {
        "law": "unrolled",
        "values": dict(published.values),
        "loops_exponent": published.loops_exponent,
        "tokens_exponent": published.tokens_exponent,
        "num_runs": len(rows),
    }
    if as_json:
        print(json.dumps({**said, "runs": rows}, indent=2))
        return
    constants = ", ".join(f"{name} {value:g}" for name, value in published.values.items())
    print(f"{sources[0]}: {len(rows)} runs; published: {constants};")
    print(f"T* ~ C^{published.loops_exponent:.2f}, D* ~ C^{published.tokens_exponent:.2f}")
    if out is not None:
        print(out)
