import math

import pytest

from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.eval import python_docs
from openmythos.eval.puzzle import ASKED_SEED, NUM_ASKED, PuzzleCodec
from openmythos.eval.score import summarise, sweep
from openmythos.eval.task import (
    EvalTask,
    choice_baselines,
    majority,
    measure,
    measure_tasks,
    shipped_task,
)
from openmythos.train.validation import puzzle_accuracy
from tests.eval.examples import documents, scorer
from tests.strategies import random_model, small_config

WALKS = Walks(HopsConfig(num_entities=12, num_relations=4, seed=2))
TEXTS = [{"text": f"text number {n}, of {n * n} things"} for n in range(5)]


def test_choices_texts_and_words_are_counted_as_the_scorer_says() -> None:
    asked = scorer()
    rows = [
        {"context": "The sky", "choices": [" is", " was blue", " x"], "answer": answer}
        for answer in range(3)
    ]
    nats = [n for n, _ in asked.loglikelihood([("The sky", c) for c in rows[0]["choices"]])]
    task = EvalTask(name="t", kind="choice", documents=rows, baselines={})
    best = nats.index(max(nats))
    assert measure(asked, task) == [(float(answer == best), 1.0) for answer in range(3)]
    assert len(measure(asked, task, limit=2)) == 2
    texts = [{"text": "naïve text"}, {"text": "another one"}]
    task = EvalTask(name="t", kind="text", documents=texts, baselines={})
    found = measure(asked, task)
    assert [size for _, size in found] == [11.0, 11.0]
    expected = [-n / math.log(2) for n in asked.rolling([t["text"] for t in texts])]
    assert [bits for bits, _ in found] == pytest.approx(expected)


def test_generated_words_are_compared_without_what_stands_around(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = scorer()
    said = {"a": " word and more", "b": " 'word'", "c": "", "d": " wording"}
    monkeypatch.setattr(
        type(asked), "generate", lambda self, requests: [said[r.context] for r in requests]
    )
    rows = [{"context": context, "target": "word"} for context in said]
    task = EvalTask(name="t", kind="generate", documents=rows, baselines={})
    assert [right for right, _ in measure(asked, task)] == [1.0, 1.0, 0.0, 0.0]


def test_tasks_at_every_depth_with_the_error_of_the_gain() -> None:
    task = EvalTask(name="t", kind="text", documents=TEXTS, baselines={})
    (curve,) = sweep((1, 3), lambda n: measure_tasks(scorer(num_loops=n), [task], 4))
    assert (curve.task, curve.metric) == ("t", "bits_per_byte")
    for loops, score in curve.scores.items():
        assert score == summarise(measure(scorer(num_loops=loops), task, 4))
    assert curve.gain is not None and curve.gain.stderr is not None
    assert curve.gain.value == pytest.approx(curve.scores[3].value - curve.scores[1].value)
    assert not curve.higher_is_better


def test_hops_is_the_accuracy_of_training() -> None:
    model = random_model(small_config(vocab_size=16))
    asked = scorer(model, codec=PuzzleCodec(WALKS), num_loops=2, batch_size=64)
    for num_hops in (1, 3):
        task = shipped_task(f"hops_{num_hops}", WALKS)
        assert task is not None and task.metric == "acc"
        assert task.baselines == WALKS.leak_baselines(num_hops)
        expected = puzzle_accuracy(model, WALKS, num_hops, 2, NUM_ASKED, ASKED_SEED)
        assert summarise(measure(asked, task)).value == pytest.approx(expected, abs=1e-6)


def test_the_tasks_that_ship(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "documents", documents)
    metrics = {}
    for name in ("python_docs_choice", "python_docs_word", "python_docs_bits"):
        task = shipped_task(name, None)
        assert task is not None and task.name == name and len(task.documents) >= 6
        metrics[name] = task.metric
        score = summarise(measure(scorer(), task, limit=4))
        assert score.num_questions == 4 and math.isfinite(score.value)
    assert list(metrics.values()) == ["acc", "exact_match", "bits_per_byte"]
    assert shipped_task("arc_easy", None) is None and shipped_task("hops_0", WALKS) is None
    with pytest.raises(ValueError, match="hops_2 needs a run on hops"):
        shipped_task("hops_2", None)
    with pytest.raises(ValueError, match="python_docs_bits needs a model of text"):
        shipped_task("python_docs_bits", WALKS)


def test_guessers() -> None:
    rows = [
        ("the cat", ["the cat", "a", "bbbb"], 0),
        ("the dog", ["x", "the", "yyyyyy"], 1),
        ("no", ["1", "22"], 0),
    ]
    found = choice_baselines(rows)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert found["position"] == pytest.approx(2 / 3)
    assert found["longest"] == pytest.approx(1 / 3)
    assert found["shortest"] == pytest.approx(1 / 3)
    assert found["overlap"] == pytest.approx(1.0)
    assert majority(["a", "b", "a"]) == pytest.approx(2 / 3)
