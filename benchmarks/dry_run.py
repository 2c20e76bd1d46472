"""Every preset's real shards against the plan, without memory: at 1, 8 and 1,024 ranks.

    .venv/bin/python -m benchmarks.dry_run            # all of them; writes benchmarks/dry_run.json
    .venv/bin/python -m benchmarks.dry_run tiny ouro-1.4b --worlds 8

The layout is the one that `openmythos plan` chooses for devices of 80 GiB; the first, the middle
and the last rank are built. Of models of up to 10b, a step on 8 devices is run, too, and its
exchanges are compared. A difference ends it with status 1. Seconds are of the processor; the peak
of memory is that of the whole process.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

from openmythos.config import counts
from openmythos.config.presets import PRESETS, preset
from openmythos.folder import write_json
from openmythos.plan.choice import plan_training
from openmythos.plan.serving import Machine
from openmythos.plan.training import Work
from openmythos.train.dry_run import dry_run_shards, dry_run_step

RESULT = Path(__file__).with_suffix(".json")
WORLDS = (1, 8, 1024)
STEP_WORLD = 8
MOST_PARAMS = 11e9  # of a model whose step is run, too
CONTEXT = 1024
DEVICE = Machine(memory_bytes=80.0 * 2**30)


def measure(name: str, world: int) -> dict[str, Any]:
    """One preset on a number of ranks: bytes off, exchanges that differ, seconds."""
    config = preset(name)
    work = Work(context_length=min(CONTEXT, config.max_seq_len))
    chosen = plan_training(config, world, DEVICE, work).chosen
    started = time.process_time()
    ranks = sorted({0, world // 2, world - 1})
    shards = [dry_run_shards(config, chosen.layout, rank) for rank in ranks]
    row: dict[str, Any] = {
        "preset": name,
        "world": world,
        "layout": chosen.in_words,
        "shard_bytes": {str(each.rank): each.built for each in shards},
        "bytes_off": max(abs(each.built - each.planned) for each in shards),
        "differing": sum(len(each.differing) for each in shards),
        "seconds": round(time.process_time() - started, 1),
    }
    if world == STEP_WORLD and counts.total_params(config) <= MOST_PARAMS:
        started = time.process_time()
        step = dry_run_step(config, chosen.layout, chosen.work)
        row["exchanges"] = {each.kind: each.counted for each in step}
        row["differing"] += sum(each.planned != each.counted for each in step)
        row["step_seconds"] = round(time.process_time() - started, 1)
    return row


def main() -> None:
    """Measure, print a line for each and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="PRESET")
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.presets:
        for world in arguments.worlds:
            row = measure(name, world)
            rows.append(row)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
            step = f", a step {row['step_seconds']} s" if "step_seconds" in row else ""
            said = f"{row['bytes_off']} bytes off, {row['differing']} differ"
            print(f"{name} on {world}: {said}, {row['seconds']} s{step}", flush=True)
            write_json(arguments.out, {"peak_gib": round(peak, 2), "runs": rows})
    sys.exit(any(row["differing"] for row in rows))


if __name__ == "__main__":
    main()
