"""Training on 1, 2 and 4 ranks against one process, every arm for many steps.

    make stress-ranks                     or   python -m tests.stress.ranks --steps 50

The cases of ``tests/train/test_two_ranks.py`` and more of them, with all arms. Each result is
written to ``ranks.json`` beside this file as soon as there is one, with the table ``ranks.md``;
``--resume`` goes on after a stop. Not part of the test suite, which has two steps on two ranks.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from openmythos.folder import write_whole
from tests.train.launch import Case, launch_each, name_of

HERE = Path(__file__).parent
AT_ONCE = 3  # cases of a launch
NUMBERS = {"loss": "loss", "grad_norm": "gradient norm", "weights": "weights"}
Results = dict[str, dict[str, Any]]  # by number of ranks, then by case: {"found": ...} or error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of each arm")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=3600, help="limit of a launch")
    parser.add_argument("--out", type=Path, default=HERE / "ranks.json", help="file of the results")
    parser.add_argument("--resume", action="store_true", help="keep what that file has")
    arguments = parser.parse_args()
    os.environ["RANKS_STEPS"] = str(arguments.steps)
    cases = all_cases()
    stored: dict[str, Any] = {"steps": arguments.steps, "ranks": {}}
    if arguments.resume and arguments.out.exists():
        kept = json.loads(arguments.out.read_text(encoding="utf-8"))
        if kept["steps"] != arguments.steps:
            parser.error(f"{arguments.out} has results of {kept['steps']} steps; choose another")
        stored = kept
    for world in arguments.ranks:
        results = stored["ranks"].setdefault(str(world), {})
        left = [case for case in cases if "found" not in results.get(name_of(case), {})]
        started = time.monotonic()
        for name, outcome in launch_each(world, left, arguments.seconds, AT_ONCE):
            failed = outcome.error is not None
            results[name] = {"error": outcome.error} if failed else {"found": outcome.results[0]}
            write_whole(arguments.out, json.dumps(stored, indent=1) + "\n")
            table = table_of(stored["steps"], cases, stored["ranks"])
            write_whole(arguments.out.with_suffix(".md"), table)
            took = time.monotonic() - started
            print(f"{took:5.0f} s  {world} ranks: {name}{' FAILED' * failed}", flush=True)
    errors = [
        f"{world} ranks: {result['error']}"
        for world, results in stored["ranks"].items()
        for result in results.values()
        if "error" in result
    ]
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


def all_cases() -> list[Case]:
    """Those of the test suite, and more; they read ``RANKS_STEPS`` when they are loaded."""
    from tests.train.test_two_ranks import MODULES

    return [case for module in MODULES for case in [*module.CASES, *getattr(module, "MORE", [])]]


def table_of(steps: int, cases: Sequence[Case], ranks: Results) -> str:
    """The page: the differences of each arm, what else passed, what failed and what is left."""
    arms = {name_of(case): case.args[0] for case in cases if isinstance(case, partial)}
    lines = [
        "# Results of `make stress-ranks`",
        "",
        f"Training over gloo ranks against one process, in fp64, {steps} steps: the largest",
        "difference in any step, relative where the number is above 1. *weights*: after the last",
        "step, absolute. The losses may differ by 1e-12, the norm of the gradients by 1e-9, the",
        "weights by 1e-12, with Muon by 1e-9.",
        "",
    ]
    for world, results in sorted(ranks.items()):
        passed = {name: r["found"] for name, r in results.items() if "found" in r}
        rows = [
            f"| {arm} | " + " | ".join(f"{passed[name][key]:.0e}" for key in NUMBERS) + " |"
            for name, arm in arms.items()
            if passed.get(name)
        ]
        number = int(world)
        ours = [name_of(case) for case in cases if number in getattr(case, "ranks", (number,))]
        said = {
            "Passed, too": [n for n in ours if n in passed and not (n in arms and passed[n])],
            "Failed": [name for name in ours if name in results and name not in passed],
            "Not run": [name for name in ours if name not in results],
        }
        lines += [f"## {world} ranks" if world != "1" else "## 1 rank", ""]
        lines += ["| arm | " + " | ".join(NUMBERS.values()) + " |", "|---" * 4 + "|", *rows, ""]
        for what, names in said.items():
            if names:
                lines += [f"{what}: {'; '.join(map(in_words, names))}.", ""]
    return "\n".join(lines)


def in_words(name: str) -> str:
    """A case's name without its module."""
    return name.split(":", 1)[1].replace("_", " ").replace(":", ": ")


if __name__ == "__main__":
    sys.exit(main())
