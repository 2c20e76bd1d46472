import itertools

import numpy as np
import pytest

from openmythos.data.products import Products, ProductsConfig

S3 = Products(ProductsConfig(max_train_factors=4), seed=1)


def test_products_by_hand() -> None:
    assert S3.words == ["123", "132", "213", "231", "312", "321"]
    # 213 swaps 1 and 2, then 132 swaps 2 and 3: 1 -> 2 -> 3, 2 -> 1 -> 1, 3 -> 3 -> 2: 312.
    # The other way round: 1 -> 1 -> 2, 2 -> 3 -> 3, 3 -> 2 -> 1: 231.
    number = {word: index for index, word in enumerate(S3.words)}
    tokens = np.array([[number[word] for word in ("213", "132", "312", "312")]])
    said = [S3.words[index] for index in S3.targets(tokens)[0]]
    assert said == ["213", "312", "231", "123"]
    assert S3.words[S3.compose[number["132"], number["213"]]] == "231"


def test_it_is_a_group_whose_order_matters() -> None:
    compose = S3.compose
    for a, b, c in itertools.product(range(6), repeat=3):
        assert compose[compose[a, b], c] == compose[a, compose[b, c]]
    assert (compose[0] == np.arange(6)).all() and (compose[:, 0] == np.arange(6)).all()
    assert all(sorted(row) == list(range(6)) for row in compose.tolist())
    assert (compose != compose.T).any()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_leaks_are_the_best_guesses_over_all_products(size: int) -> None:
    tokens = np.array(list(itertools.product(range(6), repeat=size)))
    answers = S3.targets(tokens)[:, -1]

    def best(seen: np.ndarray) -> float:
        groups = np.unique(seen, axis=0, return_inverse=True)[1].ravel()
        counts = np.zeros((groups.max() + 1, 6))
        np.add.at(counts, (groups, answers), 1)
        return float(counts.max(axis=1).sum() / len(answers))

    leaks = S3.leak_baselines(size)
    assert leaks["majority"] == pytest.approx(best(np.zeros((len(tokens), 1))))
    assert leaks["last_token"] == pytest.approx(best(tokens[:, -1:]))
    rest = tokens[:, 1:] if size > 1 else np.zeros((len(tokens), 1))
    assert leaks["suffix_only"] == pytest.approx(best(rest))
    assert leaks["chance"] == 1 / 6


def test_settings() -> None:
    assert Products(ProductsConfig(num_points=5), 0).vocab_size == 120
    assert list(S3.train_sizes) == [4] and ProductsConfig().seq_len == 16
    assert ProductsConfig().in_words == "products of 16 permutations of 3 points"
    with pytest.raises(ValueError, match="num_points is 6; it must be 2 to 5"):
        ProductsConfig(num_points=6)
