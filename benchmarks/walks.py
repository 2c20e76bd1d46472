"""How reliably the demo's act 2 learns: the same recipe from several seeds.

Each run trains as the demo does, with one thread while one other run uses the second core. The seed
decides its graph, weights and order. The table shows accuracy on held-out walks.

    python -m benchmarks.walks --seeds 0 1 2 3 4 5
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from openmythos import load_pretrained
from openmythos.config.schema import to_dict
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.demo.walks import NUM_WALKS, hops_config
from openmythos.folder import write_json
from openmythos.train.metrics import read_metrics
from openmythos.train.validation import puzzle_accuracy

CELLS = ((8, 2), (8, 8), (8, 16), (10, 2), (10, 5), (10, 8), (10, 16), (12, 8))  # hops, loops


def train(seed: int, seconds: float, folder: Path) -> dict[str, Any]:
    """One run in its own process: steps, the step at which the last stage began, accuracy."""
    out, start = folder / str(seed), folder / f"{seed}.json"
    write_json(start, to_dict(hops_config(seed, seconds)))
    command = [sys.executable, "-m", "openmythos", "train", "--config", str(start)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "--out", str(out)], env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"error: seed {seed} failed:\n{ran.stderr}")
    rows = [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"]
    model, walks = load_pretrained(out), Walks(HopsConfig(seed=seed))
    last = walks.config.max_train_hops
    return {
        "steps": rows[-1]["step"],
        "last_stage_at": next((row["step"] for row in rows if row["stage"] == last), None),
        "accuracy": {
            f"{hops} hops, {loops} loops": puzzle_accuracy(
                model, walks, hops, loops, NUM_WALKS, seed=1
            )
            for hops, loops in CELLS
        },
    }


def main() -> None:
    """Train the seeds, two at a time, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walks", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = options.seeds
    console = Console(stderr=True)
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda seed: train(seed, options.seconds, Path(folder)), seeds)
        for seed, result in zip(seeds, runs, strict=True):
            found[seed] = result
            console.print(f"seed {seed}: {result['steps']} steps")
    if options.json:
        print(json.dumps(found))
        return
    table = Table(title="accuracy in % on held-out walks, hops / loops")
    for name in ("seed", "steps", "8 hops at step", *(f"{h} / {n}" for h, n in CELLS)):
        table.add_column(name, justify="right")
    for seed, result in found.items():
        cells = [f"{value:.0%}"[:-1] for value in result["accuracy"].values()]
        table.add_row(str(seed), str(result["steps"]), str(result["last_stage_at"]), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
