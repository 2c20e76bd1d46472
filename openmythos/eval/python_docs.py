"""Questions made from held-out Python documentation.

The documents are exactly the validation split of ``openmythos prepare python-docs`` with its
default seed and fraction, so a model trained on that has not seen them. They come from the running
interpreter, so scores are comparable only under the same Python version.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from openmythos.data.file import Document
from openmythos.data.hashing import hash_bytes, split_keys, threshold
from openmythos.data.source import PYTHON_DOCS, load_documents

SPLIT_SEED, HELD_OUT_FRACTION = 0, 0.1  # the defaults of ``prepare``
MAX_QUESTIONS = 400
MAX_TEXT_CHARACTERS = 2000
NUM_CHOICES = 4
ENDING_WORDS = 6
MIN_CONTEXT_WORDS, MAX_CONTEXT_WORDS = 16, 64


def held_out(documents: Iterable[Document]) -> list[Document]:
    """The documents that ``prepare`` puts into the validation split."""
    limit = threshold(HELD_OUT_FRACTION)
    return [
        document
        for document in documents
        if split_keys(np.array([_hash(document.text)], dtype=np.uint64), SPLIT_SEED)[0] < limit
    ]


def choice_questions(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """Multiple choice of a paragraph's end: ``context``, ``choices``, ``answer`` (an index).

    All choices are the last six words of paragraphs of the same document, so that the topic does
    not give the answer away. Of those, the ones nearest in length to the right one are taken, so
    that the length does not either.
    """
    questions = []
    for document in documents:
        paragraphs = list(prose(document.text))
        endings = [" " + " ".join(words[-ENDING_WORDS:]) for words in paragraphs]
        for words, right in zip(paragraphs, endings, strict=True):
            others = sorted(set(endings) - {right}, key=lambda e: (abs(len(e) - len(right)), e))
            if len(others) < NUM_CHOICES - 1:
                continue
            context = " ".join(words[:-ENDING_WORDS][-MAX_CONTEXT_WORDS:])
            # Ordered by hash, so that the position does not give the answer away.
            choices = sorted([right, *others[: NUM_CHOICES - 1]], key=lambda e: _hash(context + e))
            answer = choices.index(right)
            questions.append({"context": context, "choices": choices, "answer": answer})
    return _chosen(questions)


def word_questions(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """The next word, a plain one of at least two letters: ``context``, ``target``."""
    questions = []
    for document in documents:
        for words in prose(document.text):
            places = [
                place
                for place in range(MIN_CONTEXT_WORDS, len(words))
                if re.fullmatch("[A-Za-z]{2,}", words[place])
            ]
            if places:
                place = places[_hash(" ".join(words)) % len(places)]
                context = " ".join(words[:place][-MAX_CONTEXT_WORDS:])
                questions.append({"context": context, "target": words[place]})
    return _chosen(questions)


def texts(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """The beginning of each document, up to the end of a paragraph: ``text``."""
    return [{"text": _beginning(document.text)} for document in documents]


def prose(text: str) -> Iterator[list[str]]:
    """The words of each paragraph of prose; code, lists and tables are left out."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        words = paragraph.split()
        sentence = re.match(r"\s*[A-Z][a-z]* [a-z]", paragraph) and paragraph.rstrip()[-1] == "."
        if sentence and len(words) >= MIN_CONTEXT_WORDS + ENDING_WORDS and ">>>" not in paragraph:
            yield words


@functools.cache
def documents() -> tuple[Document, ...]:
    """The held-out documents of the running interpreter."""
    return tuple(held_out(load_documents(PYTHON_DOCS)))


def choice_dataset(**_: Any) -> dict[str, Any]:
    """``choice_questions`` in lm-evaluation-harness' format (``custom_dataset``)."""
    return _dataset(choice_questions(documents()))


def word_dataset(**_: Any) -> dict[str, Any]:
    """``word_questions`` in lm-evaluation-harness' format (``custom_dataset``)."""
    return _dataset(word_questions(documents()))


def text_dataset(**_: Any) -> dict[str, Any]:
    """``texts`` in lm-evaluation-harness' format (``custom_dataset``)."""
    return _dataset(texts(documents()))


def _dataset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def _chosen(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most so many, spread over all documents, in an order that any first part is a sample."""
    return sorted(questions, key=lambda question: _hash(question["context"]))[:MAX_QUESTIONS]


def _beginning(text: str) -> str:
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text
    end = text.rfind("\n\n", 0, MAX_TEXT_CHARACTERS)
    return text[: end if end > 0 else MAX_TEXT_CHARACTERS]


def _hash(text: str) -> int:
    return hash_bytes(text.encode("utf-8", errors="replace"))
