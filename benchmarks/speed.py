"""Speed against the original OpenMythos with equal weights and equal work: all loops are run.

Configuration ``llama`` is a second anchor: transformers' Llama of 24.7 million parameters with the
same weights as our model of one loop, decoded by its ``generate`` with the default cache.

    python -m benchmarks.speed [--configs B,C,llama]
                               [--measures forward,train,decode1,decode8,decode32]
                               [--repeats 3] [--json]

Every timing runs in its own process with one thread; the two sides alternate. Our decoding is
the engine's, compiled, without the time to compile; the original has no compiled path. In brackets:
our session without the compiler. The bound is the time of our matrix products
alone as torch computes them, measured in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import LLAMA
from benchmarks.original import ROOT, original_module

MEASURES = ("forward", "train", "decode1", "decode8", "decode32")
TARGETS = {"train": 1.4, "decode1": 4.0, "decode8": 3.0}
LLAMA_TARGETS = {"train": 1.15, "decode1": 1.4, "decode8": 1.4}
MAX_DIFFERENCE = 1e-4


def run_child(config: str, what: str, side: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.measure", config, what, side]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"error: {config} {what} {side} failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def compare(config: str, what: str, repeats: int) -> dict[str, Any]:
    """Medians over ``repeats``; original and ours alternate."""
    found: dict[str, list[dict[str, Any]]] = {"original": [], "ours": []}
    for _ in range(repeats):
        for side, results in found.items():
            results.append(run_child(config, what, side))
    original, ours = (median(r["seconds"] for r in results) for results in found.values())
    bound = run_child(config, what, "bound")
    first = found["ours"][0]
    row = {
        "config": config,
        "measure": what,
        "original_s": original,
        "ours_s": ours,
        "original_tokens_per_s": found["original"][0]["tokens"] / original,
        "ours_tokens_per_s": first["tokens"] / ours,
        "ratio": original / ours,
        "target": (LLAMA_TARGETS if config == LLAMA else TARGETS).get(what),
        "matmul_gflop": bound["gflop"],
        "matmul_gflop_per_s": bound["gflop_per_s"],
        "bound_s": bound["bound_s"],
        "share_of_bound": bound["bound_s"] / ours,
        "original_runs_s": [r["seconds"] for r in found["original"]],
        "ours_runs_s": [r["seconds"] for r in found["ours"]],
    }
    if "model_seconds" in first:
        eager = median(r["eager_seconds"] for r in found["ours"])
        row["ours_session_s"] = median(r["session_seconds"] for r in found["ours"])
        row["ours_eager_s"], row["ratio_eager"] = eager, original / eager
        model_only = median(r["model_seconds"] for r in found["ours"])
        row["ours_eager_without_engine_s"] = model_only
        row["ratio_eager_without_engine"] = original / model_only
        row["original_kv_bytes_per_token"] = found["original"][0]["kv_bytes_per_token"]
        row["ours_kv_bytes_per_token"] = first["kv_bytes_per_token"]
    return row


def show(console: Console, agreements: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for config, found in agreements.items():
        console.print(
            f"{config}: largest difference of the logits {found['forced_difference']:.1e} with all "
            f"loops forced (scale {found['forced_scale']:.2g}), {found['halting_difference']:.1e} "
            f"as initialised (scale {found['halting_scale']:.2g})"
        )
    table = Table("config", "measure", "original", "ours", "ratio", "target", "bound", "of bound")
    for row in rows:
        decode = "ours_eager_s" in row
        sides = [f"{row[f'{s}_s'] * 1e3:.0f} ms" for s in ("original", "ours")]
        if decode:
            sides = [f"{row[f'{s}_tokens_per_s']:.1f} tok/s" for s in ("original", "ours")]
        ratio = f"{row['ratio']:.2f}"
        ratio += f" ({row['ratio_eager']:.2f} eager)" if decode else ""
        target = "" if row["target"] is None else f"{row['target']:.1f}"
        bound = f"{row['bound_s'] * 1e3:.0f} ms at {row['matmul_gflop_per_s']:.0f} GFLOP/s"
        share = f"{row['share_of_bound']:.0%}"
        table.add_row(row["config"], row["measure"], *sides, ratio, target, bound, share)
    console.print(table)
    for row in rows:
        if "ours_kv_bytes_per_token" in row:
            console.print(
                f"{row['config']} {row['measure']}: KV bytes a token: original "
                f"{row['original_kv_bytes_per_token']:.0f}, ours {row['ours_kv_bytes_per_token']}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--configs", default="B,C,llama")
    parser.add_argument("--measures", default=",".join(MEASURES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    original_module()  # fails early, with advice, if it is not installed
    configs, measures = options.configs.split(","), options.measures.split(",")
    agreements = {config: run_child(config, "agreement", "both") for config in configs}
    for config, found in agreements.items():
        for kind in ("forced_difference", "halting_difference"):
            if not found[kind] < MAX_DIFFERENCE:
                raise SystemExit(f"error: the models differ on config {config}: {found}")
    progress, rows = Console(stderr=True, highlight=False), []
    for config in configs:
        for what in measures:
            rows.append(compare(config, what, options.repeats))
            row = rows[-1]
            progress.print(
                f"{config} {what}: {row['original_s']:.3f} s there, {row['ours_s']:.3f} s here, "
                f"ratio {row['ratio']:.2f}, {row['share_of_bound']:.0%} of the bound"
            )
    if options.json:
        print(json.dumps({"agreement": agreements, "rows": rows}, indent=2))
    else:
        show(Console(), agreements, rows)


if __name__ == "__main__":
    main()
