"""The questions, what guessers reach, and the rules on planted results."""

import random

import pytest

from experiments.run_store import Result, Results
from experiments.words_by_loops.picture import draw
from experiments.words_by_loops.questions import FRIENDS, ask, leaks
from experiments.words_by_loops.run import SEEDS, STUDY


def test_the_answer_is_where_the_walk_leads() -> None:
    for hops in (1, 2, 3, 4):
        for question in ask(hops, 20, seed=1):
            behind = dict(zip(question.named[1::2], question.named[::2], strict=True))
            place = question.start
            for _ in range(hops):
                place = behind[place]
            assert place == question.answer != question.start
            assert len(question.friends) == FRIENDS == len(behind)
    assert ask(2, 3, seed=1) == ask(2, 3, seed=1) != ask(2, 3, seed=2)


def test_guessers_that_take_no_walk_are_near_chance() -> None:
    found = leaks(ask(2, 3000, seed=5))
    assert found.pop("one step behind") == 0 == found.pop("one step before")
    assert found.pop("most frequent") < 0.1
    assert all(share == pytest.approx(0.2, abs=0.05) for share in found.values())
    assert leaks(ask(1, 50, seed=5))["one step behind"] == 1


def planted(fixed: tuple[float, float, float], sampled: tuple[float, float, float]) -> Results:
    """Of each arm the accuracy at three loops, that at others, and the bits of base text."""
    found, drawn = Results(), random.Random(0)
    for run in STUDY.runs("small", Results()):
        own = {"before": (0.2, 0.2, 4.0), "fixed": fixed, "sampled": sampled}[run.arm]
        trained, others, bits = (value + 0.004 * drawn.random() for value in own)
        answers = {
            hops: {n: {"right": trained if n == "3" else others, "nats": 1.0} for n in "1236"}
            for hops in "1234"
        }
        leaks = {hops: {"chance": 0.2} for hops in "1234"}
        data = {"answers": answers, "base_bits": dict.fromkeys("1236", bits), "leaks": leaks}
        found.append(Result(run, data, None, 1, 1, "", ""))
    return found


def test_rules_on_planted_results() -> None:
    found = STUDY.conclude(planted((0.6, 0.3, 4.5), (0.6, 0.5, 4.3)))
    assert [v.decision for v in found.verdicts] == ["holds", "holds", "holds"]
    found = STUDY.conclude(planted((0.5, 0.5, 4.1), (0.5, 0.47, 4.3)))
    assert [v.decision for v in found.verdicts] == ["fails", "fails", "fails"]
    few = Results(r for r in planted((0.5, 0.5, 4), (0.5, 0.5, 4)) if r.run.seed == SEEDS[0])
    assert {v.decision for v in STUDY.conclude(few).verdicts} == {"no result"}
    assert len(draw(found.figures["by_loops"]).axes) == 5
