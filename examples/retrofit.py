"""Turn a plain stack, such as a Llama, into a looped model that computes the same.

python examples/retrofit.py smollm2 --prelude 12 --coda 12 --out runs/looped
"""

import argparse
from pathlib import Path

import torch

import openmythos as om
from openmythos.retrofit.split import Layers, retrofit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder with a Llama, or a plain stack trained here")
    parser.add_argument("--prelude", type=int, default=2, help="layers before the loop")
    parser.add_argument("--coda", type=int, default=2, help="layers after it")
    parser.add_argument("--num-loops", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/looped"))
    given = parser.parse_args()

    plain = om.load_pretrained(given.model)
    number = plain.config.num_core_layers
    layers = Layers(
        prelude=tuple(range(given.prelude)),
        core=tuple(range(given.prelude, number - given.coda)),
        coda=tuple(range(number - given.coda, number)),
    )
    looped = retrofit(plain, layers, num_loops=given.num_loops)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        before = plain(tokens).logits
        for loops in (1, given.num_loops):
            off = (looped(tokens, num_loops=loops).logits - before).abs().max()
            print(f"{loops} loops: logits differ by {off:.1e} from the plain model's")
    om.save_pretrained(looped, given.out, om.Tokenizer.load(given.model))
    print(f"now: openmythos train --from {given.out} --data TEXT --out runs/tuned")


if __name__ == "__main__":
    main()
