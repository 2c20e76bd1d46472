"""Train the models that ship with the package, and write them into ``openmythos/zoo``.

``make zoo`` trains all; ``make zoo ARGS="walks"`` one of them, ``ARGS="walks --trained RUN"`` ships
a run that has been trained elsewhere, ``ARGS=--plan`` only says what would be trained. Weights are
stored in bf16; the scores beside them are of the weights as stored. A model's card, its README.md,
is written by hand, with the table of scores that is printed at the end.

Another model is an entry in ``recipes`` and the folder that this writes: commands, the server and
its page read from the folder which puzzle it knows.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.depth_dial import arms
from experiments.run_store import Run
from openmythos.checkpoint.save import OWN_FILES, write_checkpoint
from openmythos.command.demo import keep_freed_memory
from openmythos.command.origin import puzzle_of
from openmythos.config import RopeConfig, presets
from openmythos.config.schema import to_dict
from openmythos.data.addition import AdditionConfig
from openmythos.data.file import Document
from openmythos.data.hashing import hash_bytes
from openmythos.data.loader import TokenLoader
from openmythos.data.products import ProductsConfig
from openmythos.data.puzzle import Puzzle
from openmythos.data.puzzle_table import SeededConfig, make_puzzle, read_puzzle
from openmythos.data.source import PYTHON_DOCS, load_documents
from openmythos.demo.text import marks
from openmythos.demo.walks import hops_config
from openmythos.eval.python_docs import held_out
from openmythos.eval.scoring import Scorer
from openmythos.eval.task import measure_tasks, shipped_task
from openmythos.eval.task_name import HELD_OUT
from openmythos.folder import (
    DEPTH_FILE,
    HELD_OUT_FILE,
    PUZZLE_FILE,
    WALKS_FILE,
    replaced_folder,
    write_json,
    write_manifest,
    write_whole,
)
from openmythos.interop.hub import ZOO_FOLDER
from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.terminal import console
from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import has_tokenizer
from openmythos.train.depth_schedule import ClippedPoissonDepth, DepthSchedule, PoissonDepth
from openmythos.train.display import TrainDisplay
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import RunConfig, TextData, TrainConfig
from openmythos.train.run import set_up
from openmythos.train.trained_depth import trained_depth
from openmythos.train.validation import puzzle_accuracy

TEXT_STEPS = 1074
SAMPLE_BYTES = 64 * 1024
MIN_SHARED = 60  # characters of a paragraph that is looked for in the training text
TEXT_LOOPS = (1, 2, 4, 8, 16)
WALK_STEPS, PRODUCT_STEPS, SUM_STEPS = 1200, 1500, 4000
WALK_RATE = 0.003  # the demo's
BEST_ROPE_SEED = 4  # of the experiment's five, by how far the model goes
PUZZLE_LOOPS, NUM_PUZZLES = (1, 2, 3, 4, 6, 8, 12, 16), 512
SCORES = "scores.json"
BY_HAND = ("README.md", "LICENSE-PYTHON.txt")


def recipes() -> dict[str, RunConfig]:
    """What is trained: both acts of the demo, the first one for longer, and other puzzles.

    Of walks also the four kinds of training that the experiment ``depth_dial`` compares, and the
    one that goes furthest there.
    """
    settings = {"steps": WALK_STEPS, "rate": WALK_RATE}
    seeds = {**dict.fromkeys(arms.MAIN, 0), "rope": BEST_ROPE_SEED}
    kinds = {
        f"walks_{arm}": arms.config_of(Run(arm, seed, settings)) for arm, seed in seeds.items()
    }
    return {
        "walks": hops_config(seed=0, seconds=150.0),
        **{name: last_checkpoint_only(config) for name, config in kinds.items()},
        "products": puzzle_config(ProductsConfig(max_train_factors=8), PRODUCT_STEPS),
        "addition": puzzle_config(AdditionConfig(num_digits=1, max_terms=6), SUM_STEPS),
        "text": text_config(),
    }


def last_checkpoint_only(config: RunConfig) -> RunConfig:
    """Without the checkpoints that the experiment looks back at."""
    return replace(config, train=replace(config.train, keep_checkpoints=1))


def puzzle_config(data: SeededConfig, steps: int) -> RunConfig:
    """One looped layer on a puzzle, with rotary positions and the demo's seed."""
    demo = hops_config(seed=0, seconds=1.0)
    vocab_size = make_puzzle(data, 0).vocab_size
    model = replace(demo.model, vocab_size=vocab_size, num_core_layers=1, rope=RopeConfig())
    sampling = ClippedPoissonDepth(mean_recurrence=6, low=4, high=8)
    settings = replace(
        demo.train,
        max_seconds=None,
        max_steps=steps,
        batch_size=64,
        depth=DepthSchedule(sampling=sampling, per_sequence=True),
    )
    return RunConfig(model=model, train=settings, data=data)


def text_config() -> RunConfig:
    """Preset ``tiny`` with a context of 512, for six to seven passes over Python's documentation.

    The weight decay is for the passes; gradients go through two loops, so that loops are of use.
    """
    model = replace(presets.preset("tiny"), max_seq_len=512)
    sampling = PoissonDepth(mean_recurrence=model.num_loops)
    settings = TrainConfig(
        max_steps=TEXT_STEPS,
        batch_size=6,
        optimizer=OptimizerConfig(weight_decay=0.1),
        depth=DepthSchedule(sampling=sampling, mean_backprop_depth=2, ramp=0.6, max_loops=16),
        eval_loops=(),
    )
    return RunConfig(model=model, train=settings, data=TextData(source=PYTHON_DOCS, seq_len=512))


# --- the held-out sample --------------------------------------------------------------------------


def sample(documents: Iterable[Document], size: int = SAMPLE_BYTES) -> list[Document]:
    """Held-out documents of ``size`` bytes together, in the order of their hashes.

    The last one is cut after a paragraph, so that they have a little less.
    """
    chosen, left = [], size
    for document in sorted(held_out(documents), key=lambda d: hash_bytes(d.text.encode())):
        text = document.text
        if len(text.encode()) > left:
            room = text.encode()[:left].decode(errors="ignore")
            text = room[: max(0, room.rfind("\n\n"))]
        if text:
            chosen.append(Document(document.name, text))
        left -= len(document.text.encode())
        if left <= 0:
            break
    return chosen


def shared_paragraphs(documents: Iterable[Document], training: str) -> list[str]:
    """The paragraphs of the documents that the training text has too, white space aside."""
    known = " ".join(training.split())
    paragraphs = (
        " ".join(part.split()) for d in documents for part in re.split(r"\n\s*\n", d.text)
    )
    return [part for part in paragraphs if len(part) >= MIN_SHARED and part in known]


# --- what a folder of the zoo holds ---------------------------------------------------------------


def ship(run: Path, target: Path) -> None:
    """Write a run's newest checkpoint into the zoo: weights in bf16, and what they score.

    Raises:
        ValueError: The held-out sample shares text with the training data.
    """
    model = load_pretrained(run).to(torch.bfloat16)
    newest = max((run / "checkpoints").glob("step-*"))
    tokenizer = Tokenizer.load(newest) if has_tokenizer(newest) else None
    puzzle, others = puzzle_of(newest), {}
    depth = trained_depth(newest, model.config).schedule
    own = {*OWN_FILES, DEPTH_FILE, PUZZLE_FILE, WALKS_FILE, HELD_OUT_FILE, SCORES, *BY_HAND}
    with replaced_folder(target, own) as fresh:
        write_checkpoint(model, fresh, tokenizer)
        if puzzle is not None:
            puzzle.save(fresh)
        else:
            training = TokenLoader(run / "data", "train", seq_len=512, batch_size=1).text()
            others = bring_text(fresh, training)
        write_json(fresh / DEPTH_FILE, to_dict(depth))
        write_manifest(fresh)
        for name in BY_HAND:
            if (target / name).is_file():
                shutil.copy(target / name, fresh)
        found = scores(load_pretrained(fresh, dtype=torch.float32), fresh)
        write_json(fresh / SCORES, {**found, **others})


def bring_text(folder: Path, training: bytes) -> dict[str, float]:
    """Write the held-out sample into a folder; returns other compressors' bits per byte of it."""
    chosen = sample(load_documents(PYTHON_DOCS))
    if shared := shared_paragraphs(chosen, training.decode()):
        raise ValueError(f"the training text has {len(shared)} paragraphs of the sample: {shared}")
    rows = [json.dumps({"name": d.name, "text": d.text}) for d in chosen]
    write_whole(folder / HELD_OUT_FILE, "\n".join(rows) + "\n")
    text = "".join(d.text for d in chosen).encode()
    return {name: round(bits, 4) for name, bits in marks(training, text).items()}


def scores(
    model: RecurrentDepthLM,
    folder: Path,
    loops: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A model's scores by loops, as its folder keeps them: accuracy by size, or bits per byte."""
    puzzle = read_puzzle(folder)
    if puzzle is None:
        codec, measured = Tokenizer.load(folder), {}
        task = shipped_task(HELD_OUT, None, folder)
        assert task is not None
        for n in loops or TEXT_LOOPS:
            scorer = Scorer(model=model, codec=codec, num_loops=n)
            ((_, result),) = measure_tasks(scorer, [task]).items()
            measured[str(n)] = round(result.score.value, 4)
        return {"bits_per_byte": measured}
    return {
        "accuracy": {
            str(size): {
                str(n): round(puzzle_accuracy(model, puzzle, size, n, NUM_PUZZLES, seed=1), 4)
                for n in loops or PUZZLE_LOOPS
            }
            for size in sizes or scored_sizes(puzzle)
        }
    }


def scored_sizes(puzzle: Puzzle) -> list[int]:
    """The least size, and those of each quarter of training's largest, to half as much again."""
    largest = puzzle.max_train_size
    step, most = max(1, largest // 4), largest + largest // 2
    sizes = {puzzle.least_size, *range(step, most + 1, step)}
    return [n for n in sorted(sizes) if puzzle.least_size <= n <= (puzzle.max_size or most)]


def score_table(accuracy: Mapping[str, Mapping[str, float]], size_word: str) -> str:
    """Accuracy by size and loops, as it stands in a card."""
    loops = [*next(iter(accuracy.values()))]
    head = [size_word, f"{loops[0]} loop{'s' * (loops[0] != '1')}", *loops[1:]]
    rows = [[size, *(f"{100 * v:.1f} %" for v in row.values())] for size, row in accuracy.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Train the models that are named, or all, and write them into the package."""
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*known, []], help="default: all")
    parser.add_argument("--trained", type=Path, help="ship this run of the model that is named")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="folder of the runs")
    parser.add_argument("--plan", action="store_true", help="say what would be trained, as JSON")
    given = parser.parse_args()
    chosen = {name: known[name] for name in given.names or known}
    if given.plan:
        print(json.dumps({name: to_dict(config) for name, config in chosen.items()}, indent=2))
        return
    if given.trained is not None and len(given.names) != 1:
        parser.error("--trained is one model's run; name that model")
    keep_freed_memory()
    screen = console()
    for name, config in chosen.items():
        if given.trained is None:
            run = set_up(config, given.out / name)
            screen.print(run.in_words(config.data.in_words))
            with TrainDisplay(screen, name) as display:
                result = run.train(display)
            if result.interrupted:
                raise SystemExit(130)
            screen.print(f"{name}: step {result.step}, {result.seconds:.0f} s")
        folder = ZOO_FOLDER / name
        ship(given.trained or given.out / name, folder)
        screen.print(str(folder))
        puzzle = read_puzzle(folder)
        if puzzle is not None:
            stored = json.loads((folder / SCORES).read_text(encoding="utf-8"))
            print(score_table(stored["accuracy"], puzzle.size_word))


if __name__ == "__main__":
    main()
