import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmythos.data.hashing import hash_bytes, mix, permutation, split_keys, threshold


def test_values_are_pinned():
    # Prepared folders and running jobs depend on these numbers.
    values = mix(np.arange(3, dtype=np.uint64), 7).tolist()
    assert values == [18118111985298469400, 16790997907459186755, 16451771008405292174]
    assert permutation(8, 1, 2).tolist() == [1, 5, 7, 2, 4, 3, 6, 0]
    assert hash_bytes(b"text") == 2024992729630503895
    assert split_keys(np.array([5], dtype=np.uint64), 3) == mix(np.array([5], dtype=np.uint64), 6)


@given(st.integers(1, 200), st.integers(0, 2**70), st.integers(0, 5))
def test_permutation_has_every_index_once(size, seed, epoch):
    assert sorted(permutation(size, seed, epoch).tolist()) == list(range(size))


def test_seeds_give_unrelated_numbers():
    values = np.arange(4096, dtype=np.uint64)
    streams = [mix(values, seed) / 2.0**64 for seed in range(4)]
    for stream in streams:
        assert stream.mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs(np.corrcoef(streams) - np.eye(4)).max() < 0.06
    assert len(np.unique(np.concatenate([mix(values, seed) for seed in range(4)]))) == 4 * 4096


def test_threshold_is_passed_with_its_probability():
    keys = mix(np.arange(20_000, dtype=np.uint64), 3)
    assert (keys < threshold(0.1)).mean() == pytest.approx(0.1, abs=0.01)
    assert not (keys < threshold(0.0)).any()
