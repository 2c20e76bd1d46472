"""How often the bootstrap's 90% intervals hold the truth: ``python -m benchmarks.scaling_law``.

Sets of runs are simulated with normal noise and fitted: from Parcae's two published laws on its own
grids, and from a law with phi on 116 runs of 20 layers. The result is kept beside this file.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from openmythos.config.presets import preset
from openmythos.folder import write_json
from openmythos.plan.scaling_law import PARCAE, Fit, UnidentifiedError, fit, simulate

RESULT = Path(__file__).with_suffix(".json")
NOISE = 0.002  # nats
RESAMPLES = 200


# Of the published law only phi is known here; the rest gives losses of the usual size.
PHI_LAW = {"E": 1.9, "A": 60.0, "B": 1400.0, "a": 0.24, "b": 0.33, "phi": 0.46}


def iso_depth_runs(noise: float, seed: int) -> dict[str, np.ndarray]:
    """116 runs: layers 2 + T x 16/T + 2 of width 64 s, T in 1, 2, 4, 8, over 50 times of compute.

    Source: arXiv 2604.21106, its design; widths and budgets are ours.
    """
    rows = []
    for size in (4, 6, 8, 10, 12, 16):
        layer, head = 12 * (64 * size) ** 2, 32_768 * 64 * size
        for compute in np.geomspace(4e17, 2e19, 5):
            for loops in (1, 2, 4, 8):
                flops = 6 * (4 * layer + head + 16 * layer)
                rows.append((4 * layer + head, 16 * layer / loops, loops, compute / flops))
    table = np.array(rows[4:], dtype=float)  # 29 of the 30 pairs of width and compute
    runs = dict(zip(("once", "loop", "num_loops", "tokens"), table.T, strict=True))
    losses = Fit("iso_depth", PHI_LAW, {}, noise, len(table)).predict(runs)
    drawn = np.random.default_rng(seed).standard_normal(len(table))
    return {**runs, "loss": losses + noise * drawn}


def calibrate(name: str, num_sets: int) -> dict[str, Any]:
    """For each constant of a law: in how many sets its interval holds it."""
    truth = PHI_LAW if name == "iso_depth" else PARCAE[name].values
    law = name if name == "iso_depth" else "unrolled"
    held, refused = dict.fromkeys(truth, 0), 0
    for seed in range(num_sets):
        if name == "iso_depth":
            runs = iso_depth_runs(NOISE, seed)
        else:
            runs = simulate(PARCAE[name], preset(name), noise=NOISE, seed=seed)
        try:
            found = fit(law, runs, resamples=RESAMPLES, seed=seed)
        except UnidentifiedError:
            refused += 1
            continue
        for constant, (low, high) in found.intervals.items():
            held[constant] += low <= truth[constant] <= high
    return {"num_runs": len(runs["loss"]), "num_sets": num_sets, "held": held, "refused": refused}


def main(arguments: list[str]) -> None:
    """Calibrate each law, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=100, help="simulated sets per law")
    num_sets = parser.parse_args(arguments).sets
    started = time.process_time()
    laws = {name: calibrate(name, num_sets) for name in (*PARCAE, "iso_depth")}
    result = {
        "noise": NOISE,
        "resamples": RESAMPLES,
        "laws": laws,
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    write_json(RESULT, result)
    for name, law in laws.items():
        held = ", ".join(f"{constant} {number}" for constant, number in law["held"].items())
        print(f"{name}: of {num_sets} sets the 90% interval holds {held}; {law['refused']} refused")


if __name__ == "__main__":
    main(sys.argv[1:])
