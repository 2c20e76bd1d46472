"""Follow the state of a model from loop to loop while it reads a text.

python examples/trace_loop.py zoo:text "Return the number of items" --picture trace.png
"""

import argparse
from pathlib import Path

import torch

import openmythos as om
from openmythos.analysis.picture import save, trace_curves
from openmythos.analysis.trace import trace_loops
from openmythos.interop.hub import local_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a run, a checkpoint or zoo:text")
    parser.add_argument("text")
    parser.add_argument("--num-loops", type=int, default=16)
    parser.add_argument("--picture", type=Path, help="a .png to draw")
    given = parser.parse_args()

    model = om.load_pretrained(given.model)
    tokenizer = om.Tokenizer.load(local_folder(given.model))
    tokens = torch.tensor([tokenizer.encode(given.text)])
    trace = trace_loops(model, tokens, num_loops=given.num_loops)
    print("loop  norm of the state  step / norm  step / step before")
    for loop in range(trace.num_loops):
        ratio = trace.step_ratio[loop]
        shown = "" if ratio is None else f"{ratio:.3f}"
        norm, step = trace.state_norm[loop], trace.relative_step[loop]
        print(f"{loop + 1:4}  {norm:17.2f}  {step:11.4f}  {shown:>18}")
    if given.picture is not None:
        save(trace_curves(trace), given.picture)


if __name__ == "__main__":
    main()
