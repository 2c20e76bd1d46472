"""Continue prompts, each token with as many loops as an exit rule finds enough.

python examples/generate_with_exits.py zoo:text "The loop" "Return a list"
"""

import argparse

import openmythos as om
from openmythos.interop.hub import local_folder
from openmythos.model.exit import KLExit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a run, a checkpoint or zoo:text")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--threshold", type=float, default=0.01, help="nats; lower: more loops")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    given = parser.parse_args()

    model = om.load_pretrained(given.model)
    tokenizer = om.Tokenizer.load(local_folder(given.model))
    prompts = [[*tokenizer.begin_ids, *tokenizer.encode(text)] for text in given.prompts]
    result = om.generate(
        model,
        prompts,
        max_new_tokens=given.max_new_tokens,
        num_loops=2 * model.config.num_loops,
        exit_rule=KLExit(threshold=given.threshold),
        seed=0,
    )
    for text, tokens, loops in zip(given.prompts, result.tokens, result.loops, strict=True):
        print(text + tokenizer.decode(tokens))
        print("loops of each token:", *loops)


if __name__ == "__main__":
    main()
