"""Scores before and after: what is asked, what is stored, and what a killed run still has."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openmythos.eval.before_after import BeforeAfter, curves_of
from openmythos.eval.picture import before_after
from openmythos.interop.loading import load_config, load_pretrained
from openmythos.train.recipe import HopsData, RunConfig
from openmythos.train.run import Run, set_up
from openmythos.train.validation import held_out_bits, puzzle_accuracy
from tests.train.examples import run, text_config, write_text


def walks(out: Path, seed: int = 7, **changes: Any) -> Run:
    from openmythos.train.recipe import TrainConfig

    train = TrainConfig(
        seed=seed, init_from="zoo:walks", max_steps=2, batch_size=4, eval_loops=(1, 4), **changes
    )
    model = load_config("zoo:walks")
    return set_up(RunConfig(model=model, train=train, data=HopsData(max_train_hops=2)), out)


@pytest.mark.slow
def test_walks_are_scored_on_the_new_graph_and_on_the_old(tmp_path: Path) -> None:
    made = walks(tmp_path / "run")
    scores = BeforeAfter(made, None)
    assert scores.in_words == "base text: the walks that zoo:walks knows"
    scores.before()
    before = curves_of(scores.stored["before"])
    assert [c.task for c in before] == ["hops_1", "hops_2", "base: hops_4", "base: hops_8"]
    base = load_pretrained("zoo:walks")
    own = puzzle_accuracy(base, made.task.puzzle, 2, 4, 512, seed=1)
    assert before[1].scores[4].value == own and before[1].baselines["chance"] == 1 / 16
    assert before[3].scores[4].value > 0.95 > 0.2 > before[3].scores[1].value
    made.train()
    scores.after()
    stored = json.loads(scores.path.read_text(encoding="utf-8"))
    assert stored == scores.stored and stored["after"] != stored["before"]
    head, rows = scores.rows()
    assert [row[0] for row in rows] == ["1", "4"] and all(len(row) == len(head) for row in rows)
    drawn = before_after(before, curves_of(stored["after"]))
    assert len([axes for axes in drawn.axes if axes.get_visible()]) == 4


@pytest.mark.slow
def test_a_killed_run_still_has_its_scores_before(tmp_path: Path) -> None:
    """Whether it was killed after they were written, or with none, after its first checkpoint."""
    out = tmp_path / "run"
    BeforeAfter(walks(out), None).before()
    first = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    walks(out).train()
    again = BeforeAfter(walks(out), None)
    again.before()
    assert again.stored == first
    (out / "scores.json").unlink()
    lost = BeforeAfter(walks(out), None)
    lost.before()  # of the base, not of the trained weights
    assert lost.stored == first
    for text in ("{", "{}", "3"):
        lost.path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"scores.json holds no scores: .*; delete it"):
            BeforeAfter(walks(out), None)
    (out / "scores.json").unlink()
    with pytest.raises(ValueError, match="reads no text"):
        BeforeAfter(walks(out), "text.txt")


def test_data_that_changed_before_the_first_checkpoint_is_measured_again(tmp_path: Path) -> None:
    source = write_text(tmp_path, 40)
    config = text_config(source, max_steps=1, eval_loops=())
    run(config, tmp_path / "base")
    train = replace(config.train, init_from=str(tmp_path / "base"), eval_loops=(1,), eval_batches=1)
    config, out = replace(config, train=train), tmp_path / "tuned"
    first = BeforeAfter(set_up(config, out), None)
    first.before()
    source.write_text("Quite another text.\n\n" * 3 + source.read_text()[400:], encoding="utf-8")
    again, anew = BeforeAfter(set_up(config, out), None), tmp_path / "anew"
    again.before()
    assert again.stored["before"] != first.stored["before"]
    alone = BeforeAfter(set_up(config, anew), None)
    alone.before()
    assert again.stored["before"] == alone.stored["before"]


def test_text_is_scored_as_eval_does_it(tmp_path: Path) -> None:
    """The new task on its validation split, the base on a file or on what its run held out."""
    source = write_text(tmp_path, 40)
    config = text_config(source, max_steps=1, eval_loops=())
    run(config, tmp_path / "base")
    start = str(tmp_path / "base")
    train = replace(config.train, init_from=start, eval_loops=(1, 2), eval_batches=1)
    tuned = set_up(replace(config, train=train), tmp_path / "tuned")
    scores = BeforeAfter(tuned, None)
    assert scores.in_words == f"base text: what the run of {start} held out"
    scores.before()
    new, base = curves_of(scores.stored["before"])
    documents = held_out_bits(tuned.model, tuned.task.validation, 2, 1)
    bits = sum(bits for bits, _ in documents) / sum(size for _, size in documents)
    assert new.scores[2].value == pytest.approx(bits) and not new.higher_is_better
    assert base.task == "base text" and base.scores[1].value != base.scores[2].value
    other = tmp_path / "other.txt"
    other.write_text("Some other text. " * 20, encoding="utf-8")
    with pytest.raises(ValueError, match=r"--base-text is .*other.txt, and .*leave it out"):
        BeforeAfter(tuned, str(other))
    (tmp_path / "tuned" / "scores.json").unlink()
    given = BeforeAfter(tuned, str(other))
    assert given.in_words == f"base text: {other}, 340 bytes"
    given.before()
    with pytest.raises(ValueError, match="absent"):
        BeforeAfter(tuned, str(tmp_path / "absent.txt"))
    shutil.rmtree(tmp_path / "base" / "data")
    (tmp_path / "tuned" / "scores.json").unlink()
    none = BeforeAfter(tuned, None)
    assert none.in_words.startswith("base text: none") and "--base-text FILE" in none.in_words
