import numpy as np
import pytest

from openmythos.data.recall import Facts, FactsConfig, Recall, RecallConfig

PAIRS = Recall(RecallConfig(num_keys=5, num_values=3, max_train_pairs=3), seed=1)
FACTS = Facts(FactsConfig(num_subjects=6, num_relations=2, num_values=3), seed=1)


def test_recall_by_hand() -> None:
    ids = {word: index for index, word in enumerate(PAIRS.words)}
    assert list(ids) == ["k0", "k1", "k2", "k3", "k4", "v0", "v1", "v2"]
    text = [["k3", "v1", "k0", "v2", "k0"], ["k1", "v0", "k2", "v0", "k1"]]
    tokens = np.array([[ids[word] for word in row] for row in text])
    assert PAIRS.targets(tokens).tolist() == [
        [-100, -100, -100, -100, ids["v2"]],
        [-100, -100, -100, -100, ids["v0"]],
    ]


def test_no_row_has_a_key_twice_and_one_of_them_is_asked_for() -> None:
    tokens = PAIRS.sample_batch(0, 3, 600).tokens.numpy()
    for row in tokens.tolist():
        keys = row[:-1:2]
        assert len(set(keys)) == 3 and row[-1] in keys and max(keys) < 5
        assert all(5 <= value < 8 for value in row[1::2])
    asked = (tokens[:, :-1:2] == tokens[:, -1:]).mean(axis=0)
    assert asked == pytest.approx([1 / 3] * 3, abs=0.07)
    assert PAIRS.num_examples(2) == 5 * 4 * 9 * 2


def test_leaks_of_recall_by_hand() -> None:
    assert PAIRS.leak_baselines(1) == pytest.approx(
        {
            "chance": 1 / 3,
            "majority": 1 / 3,
            "last_token": 1 / 3,
            "suffix_only": 1.0,
            "present": 1.0,
        }
    )
    # A value of the row is the one asked for in half of the cases, else equal in a third.
    assert PAIRS.leak_baselines(2)["present"] == pytest.approx(1 / 2 + 1 / 6)


def test_facts_are_one_table_and_all_are_trained() -> None:
    batch = FACTS.sample_batch(0, 1, 400)
    known: dict[tuple[int, ...], int] = {}
    for row, answer in zip(batch.tokens.tolist(), batch.targets[:, -1].tolist(), strict=True):
        assert known.setdefault(tuple(row), answer) == answer
        assert row[0] < 6 <= row[1] < 8 <= answer < 11
    assert len(known) == 12 == FACTS.num_examples(1) and not FACTS.holds_out(1)
    other = Facts(FACTS.config, seed=2)
    assert not np.array_equal(FACTS.table, other.table)
    assert np.array_equal(FACTS.table, Facts(FACTS.config, seed=1).table)


def test_leaks_of_facts_by_hand() -> None:
    facts = Facts(FACTS.config, seed=1)
    facts.table = np.array([[8, 9], [8, 9], [8, 10], [9, 9], [10, 9], [8, 8]])
    # v0 five times of twelve; of relation 0 v0 in four of six, of relation 1 v1 in four of six.
    assert facts.leak_baselines(1) == pytest.approx(
        {"chance": 1 / 3, "majority": 5 / 12, "last_token": 8 / 12, "suffix_only": 8 / 12}
    )


def test_settings() -> None:
    with pytest.raises(ValueError, match="max_train_pairs is 8; it must be at most num_keys=4"):
        RecallConfig(num_keys=4)
    with pytest.raises(ValueError, match="facts are not held out"):
        FactsConfig(held_out_fraction=0.1)
    assert RecallConfig().in_words == "recall of one of up to 8 pairs of a key and a value"
    assert FactsConfig().in_words == "4096 facts"
