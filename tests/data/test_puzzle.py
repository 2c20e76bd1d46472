"""What holds for every puzzle: exact answers, pure batches, a held-out part, its settings kept."""

import numpy as np
import pytest
import torch

from openmythos.data.packing import IGNORED_TARGET
from openmythos.data.puzzle import Puzzle, PuzzleConfig, choose_size
from openmythos.data.puzzle_table import CONFIGS, make_puzzle
from openmythos.data.synthetic import HopsConfig, Walks

ALL: list[Puzzle] = [Walks(HopsConfig(seed=3)), *(make_puzzle(c(), 3) for c in CONFIGS.values())]
each = pytest.mark.parametrize("puzzle", ALL, ids=[puzzle.kind for puzzle in ALL])


def rows(puzzle: Puzzle, size: int, steps: int = 8) -> set[tuple[int, ...]]:
    batches = [puzzle.sample_batch(step, size, 128).tokens.tolist() for step in range(steps)]
    return {tuple(row) for batch in batches for row in batch}


@each
def test_examples_are_as_long_as_it_says_and_end_with_an_answer(puzzle: Puzzle) -> None:
    for size in puzzle.train_sizes:
        batch = puzzle.sample_batch(1, size, 16)
        assert batch.tokens.shape == (16, puzzle.num_tokens(size)) == batch.targets.shape
        assert int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < puzzle.vocab_size
        answers = batch.targets[:, -puzzle.answer_len(puzzle.question_len(size)) :]
        assert (answers >= 0).all() and int(batch.targets.max()) < puzzle.vocab_size
        assert ((batch.targets >= 0) | (batch.targets == IGNORED_TARGET)).all()
        assert batch.positions[3].tolist() == list(range(batch.tokens.shape[1]))
    assert len(set(puzzle.words)) == puzzle.vocab_size
    example = puzzle.form.rsplit("such as ", 1)[1].split()
    assert set(example) <= set(puzzle.words)


@each
def test_batches_are_pure_and_ranks_share_them(puzzle: Puzzle) -> None:
    size = puzzle.max_train_size
    whole = puzzle.sample_batch(5, size, 12).tokens
    assert torch.equal(whole, puzzle.sample_batch(5, size, 12).tokens)
    assert not torch.equal(whole, puzzle.sample_batch(6, size, 12).tokens)
    assert torch.equal(whole[1::3], puzzle.sample_batch(5, size, 12, 1, 3).tokens)
    held_out = puzzle.held_out_batch(size, 20, 2).tokens
    assert torch.equal(held_out[:7], puzzle.held_out_batch(size, 7, 2).tokens)


@each
def test_what_is_held_out_is_never_trained(puzzle: Puzzle) -> None:
    size = puzzle.max_train_size
    if not puzzle.holds_out(size):
        assert puzzle.kind == "facts"
        return
    trained, held_out = rows(puzzle, size), puzzle.held_out_batch(size, 512).tokens
    assert not trained & {tuple(row) for row in held_out.tolist()}
    assert puzzle.is_held_out(held_out.numpy()[:, : puzzle.question_len(size)], size).all()
    random = np.random.default_rng(0).integers(2**63, size=(4000, 64)).astype(np.uint64)
    drawn = puzzle.write(random[:, : puzzle.num_draws(size)], size)
    share = puzzle.is_held_out(drawn[:, : puzzle.question_len(size)], size).mean()
    assert share == pytest.approx(0.1, abs=0.02)


@each
def test_no_guesser_is_far_above_chance(puzzle: Puzzle) -> None:
    leaks = puzzle.leak_baselines(puzzle.max_train_size)
    assert list(leaks)[:4] == ["chance", "majority", "last_token", "suffix_only"]
    far = {"facts": 0.1, "induction": 0.25, "recall": 0.15}.get(puzzle.kind, 0.02)
    assert all(0 < share <= leaks["chance"] + far for share in leaks.values())


@each
def test_sizes_out_of_range(puzzle: Puzzle) -> None:
    with pytest.raises(ValueError, match=f"num_{puzzle.size_word}={puzzle.least_size - 1}, "):
        puzzle.sample_batch(0, puzzle.least_size - 1, 4)
    with pytest.raises(ValueError, match="at least 1 example"):
        puzzle.held_out_batch(puzzle.least_size, 0)
    with pytest.raises(ValueError, match="rank=2 of world_size=2"):
        puzzle.sample_batch(0, puzzle.least_size, 4, 2, 2)
    if puzzle.max_size is not None:
        with pytest.raises(ValueError, match=f"{puzzle.least_size} to {puzzle.max_size},"):
            puzzle.leak_baselines(puzzle.max_size + 1)


def test_a_share_that_leaves_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"held_out_fraction is 0\.9; it must be 0 to 0\.5"):
        PuzzleConfig(held_out_fraction=0.9)


def test_sizes_are_drawn_alike() -> None:
    chosen = [choose_size(range(2, 6), 7, step) for step in range(4000)]
    shares = np.bincount(chosen, minlength=6) / len(chosen)
    assert shares == pytest.approx([0, 0, 0.25, 0.25, 0.25, 0.25], abs=0.03)
    assert {choose_size(range(4, 5), 7, step) for step in range(9)} == {4}
