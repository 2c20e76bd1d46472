"""The tasks that ship with the project, scored without lm-evaluation-harness.

The task files in ``eval/tasks`` give the harness the same documents; both give the same numbers.

Every task has baselines, the scores of guessers that use no model: a score near one shows nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openmythos.data.puzzle import Puzzle
from openmythos.data.source import load_documents
from openmythos.eval import python_docs
from openmythos.eval.puzzle import puzzle_documents
from openmythos.eval.score import Measured, Outcomes, summarise
from openmythos.eval.scoring import GenerationRequest, Scorer
from openmythos.eval.task_name import HELD_OUT, PUZZLE, TEXT_NAMES
from openmythos.folder import HELD_OUT_FILE

Kind = Literal["choice", "next", "generate", "text"]
METRICS: dict[Kind, str] = {
    "choice": "acc",
    "next": "acc",
    "generate": "exact_match",
    "text": "bits_per_byte",
}
LOWER_IS_BETTER = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity")
WORD = re.compile("[A-Za-z]+")
WORD_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """Questions of one kind, which decides the fields of a document and the score.

    "choice": ``context``, ``choices`` and ``answer``, the index that should be the most likely
    choice. "next": ``context`` and ``target``, which greedy decoding must give. "generate": the
    same, and the first generated word must be the target. "text": ``text``, in bits per byte.
    """

    name: str
    kind: Kind
    documents: Sequence[Mapping[str, Any]]
    baselines: Mapping[str, float]

    @property
    def metric(self) -> str:
        """The name of the score."""
        return METRICS[self.kind]


# --- the tasks that ship --------------------------------------------------------------------------


def _python_docs_choice() -> EvalTask:
    questions = python_docs.choice_questions(python_docs.documents())
    rows = [(q["context"], q["choices"], q["answer"]) for q in questions]
    return EvalTask(
        name="python_docs_choice",
        kind="choice",
        documents=questions,
        baselines=choice_baselines(rows),
    )


def _python_docs_word() -> EvalTask:
    questions = python_docs.word_questions(python_docs.documents())
    return EvalTask(
        name="python_docs_word",
        kind="generate",
        documents=questions,
        baselines={"majority": majority([q["target"] for q in questions])},
    )


def _python_docs_bits() -> EvalTask:
    texts = python_docs.texts(python_docs.documents())
    return EvalTask(name="python_docs_bits", kind="text", documents=texts, baselines={})


MAKERS = (_python_docs_choice, _python_docs_word, _python_docs_bits)
TEXT_TASKS: dict[str, Callable[[], EvalTask]] = dict(zip(TEXT_NAMES, MAKERS, strict=True))


def brings_text(checkpoint: Path) -> bool:
    """Whether held-out text lies beside a checkpoint's weights."""
    return (checkpoint / HELD_OUT_FILE).is_file()


def _held_out(checkpoint: Path | None) -> EvalTask:
    if checkpoint is None or not brings_text(checkpoint):
        raise ValueError(
            f"task {HELD_OUT} needs a {HELD_OUT_FILE} beside the weights; there is none: give a "
            "model that brings it, such as zoo:text, as --data"
        )
    texts = [
        {"text": document.text} for document in load_documents(str(checkpoint / HELD_OUT_FILE))
    ]
    return EvalTask(name=HELD_OUT, kind="text", documents=texts, baselines={})


def shipped_task(
    name: str, puzzle: Puzzle | None, checkpoint: Path | None = None
) -> EvalTask | None:
    """The task of this name; None if no such task ships.

    Args:
        name: A name of ``TEXT_TASKS``, ``held_out``, or the kind of a puzzle with a size, as
            ``hops_4`` for walks of four hops.
        puzzle: The puzzle that the model was trained on; None for a model of text.
        checkpoint: The model's folder, which may bring its held-out text.

    Raises:
        ValueError: The task is for text or another puzzle than the model, or has no such size.
    """
    asked = PUZZLE.fullmatch(name)
    if asked is not None:
        kind, size = asked[1], int(asked[2])
        if puzzle is None or puzzle.kind != kind:
            of = "text" if puzzle is None else puzzle.kind
            raise ValueError(
                f"task {name} needs a run on {kind} (train --data {kind}); this is of {of}"
            )
        documents = puzzle_documents(puzzle, size)
        leaks = puzzle.leak_baselines(size)
        return EvalTask(name=name, kind="next", documents=documents, baselines=leaks)
    if name not in (*TEXT_TASKS, HELD_OUT):
        return None
    if puzzle is not None:
        raise ValueError(
            f"task {name} needs a model of text; this one knows {puzzle.kind}: give "
            f"{puzzle.kind}_{puzzle.least_size} .."
        )
    return _held_out(checkpoint) if name == HELD_OUT else TEXT_TASKS[name]()


# --- what a model answers ------------------------------------------------------------------------


def measure(scorer: Scorer, task: EvalTask, limit: int | None = None) -> Outcomes:
    """The outcome of each of the first ``limit`` questions at the scorer's depth."""
    rows = task.documents[:limit]
    if task.kind == "choice":
        return _measure_choice(scorer, rows)
    if task.kind == "next":
        asked = [(row["context"], row["target"]) for row in rows]
        return [(float(greedy), 1.0) for _, greedy in scorer.loglikelihood(asked)]
    if task.kind == "generate":
        requests = [
            GenerationRequest(context=row["context"], max_new_tokens=WORD_TOKENS, stops=("\n",))
            for row in rows
        ]
        words = [WORD.search(text) for text in scorer.generate(requests)]
        return [
            (float(word is not None and word[0] == row["target"]), 1.0)
            for word, row in zip(words, rows, strict=True)
        ]
    nats = scorer.rolling([row["text"] for row in rows])
    return [
        (-total / math.log(2), float(len(row["text"].encode())))
        for total, row in zip(nats, rows, strict=True)
    ]


def measure_tasks(
    scorer: Scorer, tasks: Sequence[EvalTask], limit: int | None = None
) -> dict[tuple[str, str], Measured]:
    """Scores of the shipped ``tasks`` at the scorer's depth, by task and metric."""
    results = {}
    for task in tasks:
        outcomes = measure(scorer, task, limit)
        results[task.name, task.metric] = Measured(
            score=summarise(outcomes),
            outcomes=outcomes,
            higher_is_better=task.metric not in LOWER_IS_BETTER,
            baselines=task.baselines,
        )
    return results


def _measure_choice(scorer: Scorer, rows: Sequence[Mapping[str, Any]]) -> Outcomes:
    asked = [(row["context"], choice) for row in rows for choice in row["choices"]]
    nats = iter([total for total, _ in scorer.loglikelihood(asked)])
    outcomes = []
    for row in rows:
        scores = [next(nats) for _ in row["choices"]]
        outcomes.append((float(scores.index(max(scores)) == row["answer"]), 1.0))
    return outcomes


# --- what no model is needed for ------------------------------------------------------------------


def choice_baselines(rows: Sequence[tuple[str, Sequence[str], int]]) -> dict[str, float]:
    """Accuracy of guessers on rows (context, choices, answer).

    chance: a uniform guess. position: always the most frequent index. longest, shortest: by
    characters. overlap: the choice with the most words in common with the context.
    """

    def share(key: Callable[[str, str], float]) -> float:
        right = 0
        for context, choices, answer in rows:
            keys = [key(context, choice) for choice in choices]
            right += keys.index(max(keys)) == answer
        return right / len(rows)

    def overlap(context: str, choice: str) -> float:
        return float(len(set(choice.lower().split()) & set(context.lower().split())))

    return {
        "chance": sum(1 / len(choices) for _, choices, _ in rows) / len(rows),
        "position": majority([answer for _, _, answer in rows]),
        "longest": share(lambda _, choice: float(len(choice))),
        "shortest": share(lambda _, choice: float(-len(choice))),
        "overlap": share(overlap),
    }


def majority(answers: Sequence[Any]) -> float:
    """Share of the most frequent answer."""
    return Counter(answers).most_common(1)[0][1] / len(answers)
