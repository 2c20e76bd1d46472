"""The server's page in a real browser: everything that a user does with it.

    make test-page                       or   make test-page ARGS="--only stop"

``make test-page`` installs playwright-core and axe-core into ``.page``; Chromium and Node.js are
the system's. ``check.mjs`` has the checks. Models are random, but for pictures:
``--pictures docs`` draws them from the models that ship.
"""

import argparse
import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from openmythos.command.decoding import load
from openmythos.command.serve import shipped
from openmythos.data.addition import Addition, AdditionConfig
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.eval.puzzle import PuzzleCodec
from openmythos.tokenizer import byte_tokenizer
from tests.serve.running import running, small_model

CHECKS = Path(__file__).parent / "check.mjs"
KEY = "the right key"


def random_models() -> dict[str, Any]:
    """Text with room for long answers, and puzzles; they are slow enough to be stopped."""
    walks, bytes_ = Walks(HopsConfig()), byte_tokenizer()
    sums = Addition(AdditionConfig(max_terms=6), seed=0)
    bytes_.end_ids = frozenset()  # an answer ends when it is stopped
    sizes = {"d_model": 64, "num_loops": 8, "max_seq_len": 4096}
    return {
        "text": (small_model(**sizes), bytes_),
        "walks": (small_model(vocab_size=walks.vocab_size), PuzzleCodec(walks)),
        "addition": (small_model(vocab_size=sums.vocab_size), PuzzleCodec(sums)),
    }


def trained_models() -> dict[str, Any]:
    """The models that ship."""
    return {path.name.removeprefix("zoo:"): load(path, "cpu") for path in shipped()}


def shrink(pictures: Path) -> None:
    """Fewer colours: a third of the bytes."""
    for path in pictures.glob("page-*.png"):
        Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)


def missing(chromium: str, packages: Path) -> str | None:
    """Why the checks cannot run; None: they can."""
    for program in (chromium, "node"):
        if shutil.which(program) is None:
            return f"there is no {program} here (Debian and Ubuntu: apt install chromium nodejs)"
    if not (packages / "node_modules/playwright-core").is_dir():
        return f"{packages} has no playwright-core; run: make test-page"
    return None


def main() -> int:
    """Serve the models and let the browser in; the status of the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--packages", type=Path, default=Path(".page"))
    parser.add_argument("--only", help="checks whose name has this in it")
    parser.add_argument("--pictures", type=Path, help="draw into this folder instead of checking")
    options = parser.parse_args()
    if reason := missing(options.chromium, options.packages):
        print(f"not run: {reason}", file=sys.stderr)
        return 1
    with ExitStack() as stack:
        models = trained_models() if options.pictures else random_models()
        given = {
            "url": stack.enter_context(running(models)).url,
            "guarded": stack.enter_context(running(keys=[KEY])).url,
            "key": KEY,
            "chromium": shutil.which(options.chromium),
            "packages": str(options.packages.resolve()),
            "only": options.only,
            "pictures": options.pictures and str(options.pictures.resolve()),
        }
        ended = subprocess.run(["node", str(CHECKS), json.dumps(given)], check=False)
    if options.pictures:
        shrink(options.pictures)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
