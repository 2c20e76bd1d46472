import itertools
from collections import Counter

import numpy as np
import pytest

from openmythos.data.addition import Addition, AdditionConfig

SUMS = Addition(AdditionConfig(), seed=1)


def test_a_sum_by_hand() -> None:
    ids = {word: index for index, word in enumerate(SUMS.words)}
    assert SUMS.answer_len(6) == 3  # 8 times 99 is 792
    # 74 + 58 = 132, the lowest digit first
    tokens = np.array([[ids[word] for word in ["4", "7", "+", "8", "5", "=", "2", "3"]]])
    assert SUMS.targets(tokens).tolist() == [[-100] * 5 + [2, 3, 1]]


def test_rows_are_sums() -> None:
    for size in (2, 4, 8):
        batch = SUMS.sample_batch(3, size, 30)
        for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            text = "".join(SUMS.words[token] for token in row)
            question, shown = text.split("=")
            terms = [int(term[::-1]) for term in question.split("+")]
            assert len(terms) == size and all(len(term) == 2 for term in question.split("+"))
            answer = f"{sum(terms):03d}"[::-1]
            assert "".join(map(str, targets[-3:])) == answer and shown == answer[:2]
            assert set(targets[:-3]) == {-100}


@pytest.mark.parametrize("size", [2, 3])
def test_leaks_are_the_best_guesses_over_all_sums(size: int) -> None:
    sums = Addition(AdditionConfig(num_digits=1, max_train_terms=3, max_terms=3), seed=0)
    rows = list(itertools.product(range(10), repeat=size))

    def best(kept: int) -> float:
        groups: dict[tuple[int, ...], Counter[int]] = {}
        for row in rows:
            groups.setdefault(row[size - kept :], Counter())[sum(row)] += 1
        return sum(max(counts.values()) for counts in groups.values()) / len(rows)

    assert sums.leak_baselines(size) == pytest.approx(
        {
            "chance": 1 / (9 * size + 1),
            "majority": best(0),
            "last_token": best(1),
            "suffix_only": best(2),
        }
    )


def test_settings() -> None:
    assert list(SUMS.train_sizes) == [2, 3, 4] and SUMS.max_size == 8
    assert AdditionConfig().seq_len == SUMS.num_tokens(4) == 14
    assert AdditionConfig().in_words == "sums of 2 to 4 numbers of 2 digits"
    with pytest.raises(ValueError, match="max_train_terms is 9; it must be 2 to max_terms=8"):
        AdditionConfig(max_train_terms=9)
