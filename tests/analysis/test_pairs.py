from dataclasses import replace

import numpy as np
import pytest
import torch

from openmythos.analysis.pairs import Pairs, puzzle_pairs, text_pairs
from openmythos.data.packing import IGNORED_TARGET
from openmythos.data.puzzle_table import CONFIGS, make_puzzle
from openmythos.data.synthetic import HopsConfig, Walks
from tests.strategies import unchecked

WALKS = Walks(HopsConfig())


def test_walks_differ_in_one_column_and_their_answers_are_right() -> None:
    pairs = puzzle_pairs(WALKS, 4, num_examples=64, seed=3)
    assert pairs.columns == ("start", "relation 1", "relation 2", "relation 3")
    assert len(pairs) == 64
    for column, texts in enumerate(pairs.corrupted):
        changed = texts != pairs.tokens
        assert bool(changed[:, column].all())
        assert int(changed.sum()) == 64
        reached = torch.from_numpy(WALKS.entities_along(texts.numpy())[:, -1])
        assert torch.equal(pairs.counterfactual_answers[column], reached)
        assert torch.equal(pairs.counted[column], reached != pairs.answers)
        is_entity = texts[:, 0] < 16
        assert bool(is_entity.all()) and bool((texts[:, 1:] >= 16).all())
    assert bool(pairs.counted[0].all()), "relations are permutations: another start, another answer"
    assert torch.equal(pairs.tokens, WALKS.held_out_batch(4, 64, 3).tokens)


def test_text_is_corrupted_by_distance() -> None:
    corpus = torch.arange(1000)  # every token says where it stands
    pairs = text_pairs(corpus, length=7, num_examples=50, seed=1)
    assert pairs.columns == ("1", "2-3", "4-6")
    assert torch.equal(pairs.answers, pairs.tokens[:, -1] + 1)
    changed = (pairs.corrupted != pairs.tokens).any(dim=1)
    assert changed.tolist() == [
        [False, False, False, False, False, True, False],
        [False, False, False, True, True, False, False],
        [True, True, True, False, False, False, False],
    ]
    assert bool(((pairs.corrupted >= 0) & (pairs.corrupted < 1000)).all())
    again = text_pairs(corpus, length=7, num_examples=50, seed=1)
    assert torch.equal(pairs.corrupted, again.corrupted)


def test_text_whose_counterfactual_answer_is_the_answer_does_not_count() -> None:
    pairs = text_pairs(torch.tensor([5, 5, 5, 6] * 20), length=4, num_examples=200)
    same_answer = pairs.counterfactual_answers == pairs.answers
    same_text = (pairs.corrupted == pairs.tokens).all(dim=-1)
    assert bool(same_answer.any()) and bool(same_text.any())
    assert torch.equal(pairs.counted, ~(same_answer | same_text))


def test_batches_are_the_pairs_in_order() -> None:
    pairs = puzzle_pairs(WALKS, 3, num_examples=10)
    parts = list(pairs.batches(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    for name, dim in {"tokens": 0, "corrupted": 1, "answers": 0, "counted": 1}.items():
        assert torch.equal(torch.cat([getattr(p, name) for p in parts], dim), getattr(pairs, name))
    assert parts[0].to(torch.device("cpu")).columns == pairs.columns


def test_bad_input_is_named() -> None:
    pairs = puzzle_pairs(WALKS, 3, num_examples=4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(pairs.batches(0))
    with pytest.raises(ValueError, match="the last token is corrupted"):
        replace(pairs, corrupted=pairs.corrupted.flip(-1))
    with unchecked(), pytest.raises(ValueError, match=r"counted has shape \(2, 4\)"):
        replace(pairs, counted=pairs.counted[:2])
    with pytest.raises(ValueError, match="length is 8"):
        text_pairs(torch.arange(8), length=8)
    assert isinstance(text_pairs(torch.arange(9), length=8), Pairs)


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_puzzle_is_corrupted_within_its_kinds_of_words(kind: str) -> None:
    puzzle = make_puzzle(CONFIGS[kind](), seed=5)
    size = puzzle.max_train_size
    assert sum(puzzle.kinds) == puzzle.vocab_size
    assert len(puzzle.places(size)) == puzzle.question_len(size)
    pairs = puzzle_pairs(puzzle, size, num_examples=24, seed=2)
    clean = puzzle.held_out_batch(size, 24, 2)
    asked = puzzle.question_len(size)
    assert torch.equal(pairs.tokens, clean.tokens[:, :asked])
    assert torch.equal(pairs.answers, clean.targets[:, asked - 1])
    edges = torch.tensor(puzzle.kinds).cumsum(0)
    for texts, others, counted in zip(
        pairs.corrupted, pairs.counterfactual_answers, pairs.counted, strict=True
    ):
        changed = texts != pairs.tokens
        assert changed.sum(dim=1).tolist() == [1] * 24
        assert len(changed.nonzero()[:, 1].unique()) == 1
        kinds = [(edges <= tokens[..., None]).sum(dim=-1) for tokens in (texts, pairs.tokens)]
        assert torch.equal(*kinds)
        whole = np.concatenate([texts.numpy(), clean.tokens[:, asked:].numpy()], axis=1)
        right = torch.from_numpy(puzzle.targets(whole)[:, asked - 1])
        assert torch.equal(counted, (right != pairs.answers) & (right != IGNORED_TARGET))
        assert torch.equal(others[counted], right[counted])
    named = {name for name in puzzle.places(size)[:-1] if name is not None}
    assert set(pairs.columns) == named and bool(pairs.counted.any())
    parts = list(pairs.each_column())
    assert [part.columns for part in parts] == [(name,) for name in pairs.columns]
    assert torch.equal(torch.cat([part.corrupted for part in parts]), pairs.corrupted)


def test_products_and_sums_hang_on_what_they_should() -> None:
    products = puzzle_pairs(make_puzzle(CONFIGS["products"](), seed=0), 6, num_examples=20)
    assert bool(products.counted.all())  # in a group, every factor decides
    sums = puzzle_pairs(make_puzzle(CONFIGS["addition"](), seed=0), 3, num_examples=20)
    ones = torch.tensor([name.endswith(" 1s") for name in sums.columns])
    assert sums.columns[:2] == ("number 1, 1s", "number 1, 10s")
    assert bool(sums.counted[ones].all()) and not bool(sums.counted[~ones].any())
    digits = puzzle_pairs(make_puzzle(CONFIGS["addition"](num_digits=1), seed=0), 2, 4)
    assert digits.columns == ("number 1", "number 2")


def test_a_word_that_is_the_only_one_of_its_kind_has_no_column() -> None:
    assert puzzle_pairs(Walks(HopsConfig(num_relations=1)), 4, num_examples=4).columns == ("start",)


def test_a_question_of_one_token_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="nothing can be replaced before the last token"):
        puzzle_pairs(make_puzzle(CONFIGS["products"](), seed=0), 1)
