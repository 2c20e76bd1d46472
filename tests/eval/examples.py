"""Small models, documents and task files for the tests of evaluation."""

import json
from pathlib import Path
from typing import Any

from openmythos.data.file import Document
from openmythos.eval.scoring import Scorer
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from tests.strategies import random_model, small_config

TOPICS = ("list", "string", "socket", "module", "thread", "number")
VERBS = ("returns", "removes", "sorts", "closes", "imports", "counts")


def sentence(topic: int, number: int) -> str:
    """A made-up paragraph of one sentence, long enough to be asked about."""
    noun, verb = TOPICS[topic], VERBS[number % len(VERBS)]
    start = f"The {noun} method number {number} {verb} every value that the caller has given it"
    return f"{start} before, unless the {noun} is empty, and then it {verb} item {number * 7} only."


def documents() -> list[Document]:
    """Six documents of five paragraphs, with code between."""
    made = []
    for topic, name in enumerate(TOPICS):
        paragraphs = [sentence(topic, number) for number in range(5)]
        code = f">>> {name}()\n{name}.method"
        text = "\n\n".join([f"module:{name}", *paragraphs[:3], code, *paragraphs[3:]]) + "\n"
        made.append(Document(name, text))
    return made


def text_model(vocab_size: int = 259, max_seq_len: int = 256, **changes: Any) -> RecurrentDepthLM:
    return random_model(small_config(vocab_size=vocab_size, max_seq_len=max_seq_len, **changes))


def scorer(model: RecurrentDepthLM | None = None, **changes: Any) -> Scorer:
    """A scorer with the byte tokenizer."""
    fields: dict[str, Any] = {
        "model": text_model() if model is None else model,
        "codec": byte_tokenizer(),
        "num_loops": 3,
    }
    return Scorer(**{**fields, **changes})


def bpe() -> Tokenizer:
    return train_bpe([document.text for document in documents()], 320)


CHOICES = [
    {"q": "The sky is", "options": [" blue", " made of stone", " x"], "gold": 0},
    {"q": "One and one\nare", "options": [" two", " seven hundred", " one"], "gold": 2},
    {"q": "", "options": ["begin", "end", "neither of them"], "gold": 1},
]
TEXTS = [{"text": "A short text."}, {"text": "def f(x):\n    return x\n" * 12}]
QUESTIONS = [
    {"q": "Count: one two three", "a": " four"},
    {"q": "b", "a": " c"},
    {"q": "def f(x):\n    ret", "a": "urn x"},
]
TASKS = {
    "some_choice": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "q",
            "doc_to_choice": "options",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in ("acc", "acc_norm")
            ],
        },
    ),
    "some_text": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                {
                    "metric": name,
                    "aggregation": "bits_per_byte"
                    if name == "bits_per_byte"
                    else "weighted_perplexity",
                    "higher_is_better": False,
                }
                for name in ("bits_per_byte", "byte_perplexity")
            ],
        },
    ),
    "some_answer": (
        QUESTIONS,
        {
            "output_type": "generate_until",
            "doc_to_text": "q",
            "doc_to_target": "a",
            "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            ],
        },
    ),
}


def write_tasks(folder: Path) -> Path:
    """A folder of task files with their data beside them; JSON is YAML too."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (rows, fields) in TASKS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
            "test_split": "test",
            **fields,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder
