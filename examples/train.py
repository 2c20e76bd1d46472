"""Train a small looped model on a folder of text.

python examples/train.py notes --out runs/example --steps 300
"""

import argparse
from dataclasses import replace
from pathlib import Path

import openmythos as om
from openmythos.train.recipe import RunConfig, TextData, TrainConfig
from openmythos.train.run import set_up
from openmythos.train.validation import held_out_bits_per_byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", help="a folder or file of text")
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=160, help="numbers in the state of a token")
    given = parser.parse_args()

    model = replace(om.preset("tiny"), d_model=given.width)
    training = TrainConfig(max_steps=given.steps, batch_size=4, eval_loops=())
    config = RunConfig(model=model, data=TextData(source=given.text), train=training)
    run = set_up(config, given.out)  # in a folder with a stopped run it goes on from there
    run.train()
    for loops in (1, 2, 4, 8):
        bits = held_out_bits_per_byte(run.model, run.task.validation, loops)
        print(f"{loops} loops: {bits:.3f} bits per byte of the held-out text")


if __name__ == "__main__":
    main()
