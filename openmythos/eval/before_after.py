"""Scores by loops before and after fine-tuning: on the new task, and on what the base was good at.

They lie in the run's ``scores.json``. What was measured before training is written before the first
step, so that a run which is killed and goes on still has it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openmythos.data.index import INDEX_FILE
from openmythos.data.loader import TokenLoader
from openmythos.data.puzzle import Puzzle
from openmythos.data.puzzle_table import read_puzzle
from openmythos.data.source import load_documents
from openmythos.eval.puzzle import PuzzleCodec
from openmythos.eval.score import Measured, Results, ScoreCurve, summarise, sweep
from openmythos.eval.scoring import Codec, Scorer
from openmythos.eval.task import EvalTask, brings_text, measure_tasks, shipped_task
from openmythos.folder import HELD_OUT_FILE, write_json
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.run import Run
from openmythos.train.run_folder import SCORES_FILE
from openmythos.train.task import MixtureTask, PuzzleTask, TextTask
from openmythos.train.validation import held_out_bits

BASE_BYTES = 32 * 1024  # of base text that are scored
WINDOW = 512  # tokens that are read at once
Measure = Callable[[RecurrentDepthLM, int], Results]


@dataclass(frozen=True)
class Base:
    """What tells how much of the base is left: its name, and how it is measured."""

    name: str
    measure: Measure


class BeforeAfter:
    """The scores of a run that starts from a checkpoint.

    Attributes:
        base: What is measured of the base; None: nothing is known.
        stored: What scores.json holds: ``base``, what was ``given`` for it, ``loops``, and the
            curves ``before`` and ``after``.
    """

    def __init__(self, run: Run, base_text: str | None) -> None:
        """Find what is to be measured, and what has been.

        Raises:
            ValueError: The base text cannot be read, is not what it was, or the model reads none.
        """
        self.run, self.path = run, run.folder.path / SCORES_FILE
        old = _read_scores(self.path) if self.path.is_file() else None
        if old is not None and base_text not in (None, old["given"]):
            raise ValueError(
                f"--base-text is {base_text}, and {self.path} was measured before training on "
                f"{old['base'] or 'no base text'}; leave it out, or choose another --out"
            )
        given = base_text if old is None else old["given"]
        self.base = _base(run, given)
        self.stored: dict[str, Any] = {
            "base": self.base and self.base.name,
            "given": given,
            "loops": list(run.config.train.eval_loops),
        }
        if old is not None and old["base"] != self.stored["base"]:
            raise ValueError(
                f"{self.path} was measured before training on {old['base']}, which cannot be read "
                "any more; restore it, or go on without scores: --set train.eval_loops=[]"
            )
        self.stored = old or self.stored

    @property
    def in_words(self) -> str:
        """What the base is scored on."""
        if self.base is None:
            start = self.run.config.train.init_from
            return (
                f"base text: none; {start} names none, so what fine-tuning costs elsewhere is not "
                "measured: give --base-text FILE"
            )
        return f"base text: {self.base.name}"

    def before(self) -> None:
        """Measure the model that training starts from, unless that has been done.

        Before the first checkpoint it is done again: a run that begins anew prepares its data anew.

        Raises:
            ValueError: The run has begun without it, and its base cannot be loaded any more; or
                there is nothing to measure.
        """
        begun = self.run.folder.last_checkpoint() is not None
        if begun and "before" in self.stored:
            return
        model, start = self.run.model, self.run.config.train.init_from
        if begun:
            assert start is not None
            model = load_pretrained(start, device=self.run.model.embed.weight.device)
        self._keep("before", model)

    def after(self) -> None:
        """Measure the trained model on the same questions."""
        self._keep("after", self.run.model)

    def _keep(self, when: str, model: RecurrentDepthLM) -> None:
        measures = [_new_task(self.run), *([self.base.measure] if self.base else [])]

        def measure_at(loops: int) -> Results:
            return {key: value for one in measures for key, value in one(model, loops).items()}

        curves = sweep(self.stored["loops"], measure_at)
        if not curves:
            raise ValueError("nothing is held out, and there is no base text")
        self.stored[when] = [curve.to_dict() for curve in curves]
        write_json(self.path, self.stored)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """A table: a row per number of loops, two columns per curve."""
        before, after = self.stored["before"], self.stored["after"]
        head = ["loops"]
        for curve in after:
            metric = curve["metric"].replace("_", " ")
            head += [f"{curve['task']}\n{metric}\nbefore", "\n\nafter"]
        rows = []
        for number, point in enumerate(after[0]["scores"]):
            cells = [str(point["num_loops"])]
            for old, new in zip(before, after, strict=True):
                cells += [f"{curve['scores'][number]['value']:.4f}" for curve in (old, new)]
            rows.append(cells)
        return head, rows


def _read_scores(path: Path) -> dict[str, Any]:
    """What was stored.

    Raises:
        ValueError: It is damaged.
    """
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"base", "given", "loops"} <= {*stored}:
            raise ValueError("fields are missing")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} holds no scores: {error}; delete it, and what was before training is measured "
            "again"
        ) from None
    return stored


def _new_task(run: Run) -> Measure:
    """What the run trains on: held-out text by source, or the larger puzzles."""
    task, batches = run.task, run.config.train.eval_batches
    if isinstance(task, PuzzleTask):
        return _puzzles(task.puzzle, "")
    if isinstance(task, MixtureTask):
        loaders = [(name, loader) for name, _, loader in task.held_out]
    else:
        assert isinstance(task, TextTask)
        loaders = [] if task.validation is None else [("held-out text", task.validation)]

    def measure(model: RecurrentDepthLM, loops: int) -> Results:
        found: dict[tuple[str, str], Measured] = {}
        for name, loader in loaders:
            found |= _bits(f"new: {name}", model, loader, loops, batches)
        return found

    return measure


def _base(run: Run, text: str | None) -> Base | None:
    """What the user names, or the checkpoint does: its text, its run's data, its puzzle."""
    start = run.config.train.init_from
    assert start is not None
    tokenizer = run.folder.tokenizer
    if tokenizer is None:
        if text is not None:
            raise ValueError(f"--base-text {text}: {start} reads no text; leave it out")
        puzzle = _quietly(start, read_puzzle)
        same = isinstance(run.task, PuzzleTask) and puzzle is not None
        if puzzle is None or (same and puzzle.settings == run.task.puzzle.settings):  # type: ignore[attr-defined]
            return None
        return Base(f"the {puzzle.noun}s that {start} knows", _puzzles(puzzle, "base: "))
    source = text
    if text is None:
        folder = _quietly(start, lambda folder: folder)
        if folder is None:
            return None
        if brings_text(folder):
            source = str(folder / HELD_OUT_FILE)
        elif (data := folder.parent.parent / "data") and (data / INDEX_FILE).is_file():
            return _held_out(run, data, start)
    if source is None:
        return None
    documents, size = [], 0
    for document in load_documents(source):
        cut = document.text.encode()[: BASE_BYTES - size].decode(errors="ignore")
        documents += [{"text": cut}] if cut else []
        size += len(cut.encode())
        if size >= BASE_BYTES:
            break
    if not documents:
        raise ValueError(f"--base-text {text} holds no text")
    task = EvalTask(name="base text", kind="text", documents=documents, baselines={})
    name = f"{text or start + '/' + HELD_OUT_FILE}, {size:,} bytes"
    return Base(name, _tasks([task], tokenizer, WINDOW))


def _held_out(run: Run, data: Path, start: str) -> Base | None:
    """What the base's own run held out, read in the rows of this one."""
    length = min(WINDOW, run.model.config.max_seq_len)
    try:
        loader = TokenLoader(data, "val", seq_len=length, batch_size=4)
    except ValueError:  # nothing was held out
        return None
    batches = max(1, BASE_BYTES // (16 * length))

    def measure(model: RecurrentDepthLM, loops: int) -> Results:
        return _bits("base text", model, loader, loops, batches)

    return Base(f"what the run of {start} held out", measure)


def _quietly(start: str, read: Callable[[Path], Any]) -> Any:
    """What a checkpoint says; None if it is gone or damaged, which is for others to say."""
    try:
        return read(local_folder(start))
    except ValueError:
        return None


def _bits(
    name: str, model: RecurrentDepthLM, loader: TokenLoader, loops: int, batches: int
) -> Results:
    documents = held_out_bits(model, loader, loops, batches)
    found = Measured(score=summarise(documents), outcomes=documents, higher_is_better=False)
    return {(name, "bits_per_byte"): found}


def _puzzles(puzzle: Puzzle, prefix: str) -> Measure:
    """Accuracy on the largest size of training and on half of it."""
    most = puzzle.max_train_size
    sizes = sorted({max(puzzle.least_size, most // 2), most})
    found = [shipped_task(f"{puzzle.kind}_{size}", puzzle) for size in sizes]
    tasks = [replace(task, name=f"{prefix}{task.name}") for task in found if task is not None]
    return _tasks(tasks, PuzzleCodec(puzzle), None)


def _tasks(tasks: Sequence[EvalTask], codec: Codec, limit: int | None) -> Measure:
    def measure(model: RecurrentDepthLM, loops: int) -> Results:
        most = model.config.max_seq_len if limit is None else min(limit, model.config.max_seq_len)
        scorer = Scorer(model=model, codec=codec, num_loops=loops, limit=most)
        return measure_tasks(scorer, tasks)

    return measure


def curves_of(stored: Sequence[dict[str, Any]]) -> list[ScoreCurve]:
    """Stored curves, to be drawn."""
    from openmythos.eval.score import Score

    return [
        ScoreCurve(
            task=curve["task"],
            metric=curve["metric"],
            higher_is_better=curve["higher_is_better"],
            scores={
                p["num_loops"]: Score(p["value"], p["stderr"], p["num_questions"])
                for p in curve["scores"]
            },
            baselines=curve["baselines"],
        )
        for curve in stored
    ]
