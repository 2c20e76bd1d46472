"""Every preset's real shards against the plan, without memory: at 1, 8 and 1,024 ranks.

    .venv/bin/python -m benchmarks.dry_run            # all of them; writes benchmarks/dry_run.json
    .venv/bin/python -m benchmarks.dry_run tiny ouro-1.4b --worlds 8

Each line is a process of its own: `openmythos plan PRESET --devices N --dry-run`, with the layout
that the plan chooses; for models of up to 10b on 8 devices also a step with its exchanges. A
difference ends it with status 1.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openmythos.config import counts
from openmythos.config.presets import PRESETS, preset
from openmythos.folder import write_json

RESULT = Path(__file__).with_suffix(".json")
WORLDS = (1, 8, 1024)
MOST_PARAMS = 11e9  # of a model whose step is run, too
CONTEXT = 1024


def measure(name: str, world: int, kind: str) -> dict[str, Any]:
    """One dry run: what differs, seconds and peak memory."""
    command = [sys.executable, "-W", "ignore", "-m", "openmythos", "plan", name]
    command += ["--devices", str(world), "--memory-gib", "80", "--json", "--dry-run", kind]
    command += ["--context-length", str(min(CONTEXT, preset(name).max_seq_len))]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    row: dict[str, Any] = {"preset": name, "world": world, "kind": kind}
    row |= {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(usage.ru_utime)}
    row["peak_gib"] = round(usage.ru_maxrss / 2**20, 2)  # in KiB on Linux
    if process.returncode not in (0, 1) or not printed:
        return {**row, "failed": True}
    report = json.loads(printed)
    found = report["dry_run"]
    row["layout"] = report["chosen"]["in_words"]
    row["shard_bytes"] = {str(each["rank"]): each["built"] for each in found["shards"]}
    row["bytes_off"] = max(abs(each["built"] - each["planned"]) for each in found["shards"])
    row["differing"] = sum(len(each["differing"]) for each in found["shards"])
    if kind == "step":
        row["exchanges"] = found["step"]
        row["differing"] += sum(each["planned"] != each["counted"] for each in found["step"])
    return row


def main() -> None:
    """Measure, print a line per dry run and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="PRESET")
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.presets:
        for world in arguments.worlds:
            small = counts.total_params(preset(name)) <= MOST_PARAMS
            kind = "step" if small and world == WORLDS[1] else "shards"
            row = measure(name, world, kind)
            rows.append(row)
            said = "failed" if row.get("failed") else f"{row['bytes_off']} bytes off"
            print(f"{name} on {world}, {kind}: {said}, {row['seconds']} s, {row['peak_gib']} GiB")
            write_json(arguments.out, rows)
    sys.exit(any(row.get("failed") or row["differing"] for row in rows))


if __name__ == "__main__":
    main()
