import math
import statistics

import pytest

from openmythos.data.synthetic import HopsConfig, HopsTask
from openmythos.eval import python_docs
from openmythos.eval.task import (
    EvalTask,
    choice_baselines,
    differences,
    majority,
    measure,
    shipped_task,
    summarise,
)
from openmythos.eval.walk import NUM_WALKS, WALK_SEED, WalkCodec
from openmythos.train.task import hops_accuracy
from tests.eval.examples import documents, scorer
from tests.strategies import random_model, small_config

WALKS = HopsConfig(num_entities=12, num_relations=4, seed=2)


def test_the_mean_of_plain_questions() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    score = summarise([(value, 1.0) for value in values])
    assert score.value == pytest.approx(0.6) and score.num_questions == 5
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert summarise([(1.0, 1.0)]).stderr is None


def test_the_ratio_of_bits_and_bytes() -> None:
    score = summarise([(20.0, 10.0), (90.0, 30.0)])
    assert score.value == pytest.approx(110 / 40)
    residuals = (20 - 2.75 * 10) ** 2 + (90 - 2.75 * 30) ** 2
    assert score.stderr == pytest.approx(math.sqrt(residuals * 2) / 40)
    exact = summarise([(2.5 * size, size) for size in (10.0, 20.0, 70.0)])
    assert exact.value == pytest.approx(2.5) and exact.stderr == pytest.approx(0, abs=1e-12)


def test_differences_know_that_the_questions_are_the_same() -> None:
    shallow = [(float(n % 2), 1.0) for n in range(100)]
    deep = [(1.0, 1.0), *shallow[1:]]  # one more is right
    gain = summarise(differences(deep, shallow))
    assert gain.value == pytest.approx(0.01)
    apart = summarise(deep).stderr
    assert gain.stderr is not None and apart is not None and gain.stderr < apart / 4


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


def test_hops_is_the_accuracy_of_training() -> None:
    model = random_model(small_config(vocab_size=16))
    asked = scorer(model, codec=WalkCodec(WALKS), num_loops=2, batch_size=64)
    for num_hops in (1, 3):
        task = shipped_task(f"hops_{num_hops}", WALKS)
        assert task is not None and task.metric == "acc"
        assert task.baselines == HopsTask(WALKS).leak_baselines(num_hops)
        expected = hops_accuracy(model, HopsTask(WALKS), num_hops, 2, NUM_WALKS, WALK_SEED)
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
    with pytest.raises(ValueError, match="hops_2 needs a run on walks"):
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
