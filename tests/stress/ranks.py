"""Training on 1, 2 and 4 ranks against one process, every arm for many steps.

    make stress-ranks                     or   python -m tests.stress.ranks --steps 50

The cases of ``tests/train/test_ranks.py`` and more of them, with all arms. The differences are
written to ``ranks.md`` beside this file. Not part of the test suite, which has two steps on two
ranks.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.train.launch import launch, name_of

HERE = Path(__file__).parent
CLASS_OF = {"loss": "loss", "grad_norm": "gradient norm", "weights": "weights"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of each arm")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=3600, help="limit of a launch")
    parser.add_argument("--out", type=Path, default=HERE / "ranks.md", help="file of the table")
    arguments = parser.parse_args()
    os.environ["RANKS_STEPS"] = str(arguments.steps)
    from tests.train.test_ranks import MODULES

    cases = [case for module in MODULES for case in [*module.CASES, *getattr(module, "MORE", [])]]
    lines = [
        "# Results of `make stress-ranks`",
        "",
        f"fp64, {arguments.steps} steps, gloo: the largest difference to one process in any step,",
        "relative where the number is above 1. *weights*: after the last step, absolute.",
        "",
    ]
    failures = []
    for world in arguments.ranks:
        started = time.monotonic()
        outcomes = launch(world, cases, arguments.seconds)
        failed = [f"{world} ranks: {o.error}" for o in outcomes.values() if o.error is not None]
        failures += failed
        took = time.monotonic() - started
        print(
            f"{world} ranks: {len(outcomes)} cases, {len(failed)} failed, {took:.0f} s", flush=True
        )
        lines += [f"## {world} ranks: {len(outcomes)} cases, {len(failed)} failed", ""]
        for case in cases:
            if case.__name__.startswith("every_arm"):
                lines += table_of(outcomes[name_of(case)].results)
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def table_of(results: tuple[Any, ...]) -> list[str]:
    """The differences of each arm on the first rank, as lines of Markdown."""
    if not results or not results[0]:
        return []
    head = ["", "| arm | " + " | ".join(CLASS_OF.values()) + " |", "|---" * 4 + "|"]
    rows = [
        f"| {arm} | " + " | ".join(f"{found[name]:.0e}" for name in CLASS_OF) + " |"
        for arm, found in results[0].items()
    ]
    return [*head[1:], *rows, ""]


if __name__ == "__main__":
    sys.exit(main())
