"""``00_minimal_loop`` with the library: train on walks, map what each loop reads.

python -m experiments.01_with_the_library.with_the_library --out runs/first_map
"""

import argparse
from dataclasses import replace
from pathlib import Path

from openmythos.analysis.difference import loop_difference
from openmythos.analysis.pairs import puzzle_pairs
from openmythos.analysis.reading import reading_map
from openmythos.demo.walks import hops_config
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.recipe import HopsData, RunConfig
from openmythos.train.run import set_up
from openmythos.train.task import PuzzleTask
from openmythos.train.validation import puzzle_accuracy

LOOPS, STEPS, LONGER = 4, 1200, 10


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; goes on there")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    demo = hops_config(seed=0, seconds=1.0)
    depth = DepthSchedule(sampling=FixedDepth(mean_recurrence=LOOPS))
    train = replace(demo.train, max_seconds=None, max_steps=given.steps, depth=depth)
    model, data = replace(demo.model, num_loops=LOOPS), HopsData(check_loops=LOOPS, mixed=False)
    run = set_up(RunConfig(model=model, train=train, data=data), given.out)
    run.train()
    assert isinstance(run.task, PuzzleTask)
    walks = run.task.puzzle
    right = {n: puzzle_accuracy(run.model, walks, LONGER, n, 512, seed=1) for n in range(4, 9)}
    loops = max(right, key=lambda n: right[n])
    print(f"{LONGER} hops, never trained, right by loops: {right}")
    found = reading_map(run.model, puzzle_pairs(walks, LONGER), loops)
    print("       " + "".join(f"{name.replace('relation ', 'r'):>6}" for name in found.columns))
    for loop, row in enumerate(found.necessity.tolist(), start=1):
        print(f"loop {loop} " + "".join(f"{share:6.2f}" for share in row))
    between = loop_difference(found)
    print(f"bits between neighbouring loops: {between.bits}, of shuffled loops: {between.null}")


if __name__ == "__main__":
    main()
