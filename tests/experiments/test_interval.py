import math

import numpy as np
import pytest

from experiments.interval import gap, t_interval


def test_t_interval() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)  # the deviation is 1
    assert (found.mean, found.deviation, found.count) == (2.0, 1.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert t_interval([2.0]).high == math.inf and "one value" in str(t_interval([2.0]))
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_the_t_interval_covers() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 5))
    covered = [t_interval(row.tolist()) for row in draws]
    assert np.mean([i.low <= 0 <= i.high for i in covered]) == pytest.approx(0.95, abs=0.015)


def test_a_gap_under_two_deviations_is_no_result() -> None:
    near, far = [0.0, 1.0, 2.0], [1.9, 2.9, 3.9]  # deviation 1 in each arm
    assert not gap(far, near).is_result
    found = gap([2.1, 3.1, 4.1], near)
    assert found.is_result and found.difference.mean == pytest.approx(2.1)
    assert gap(near, [2.1, 3.1, 4.1]).difference.mean == pytest.approx(-2.1)
    assert not gap([9.0], [0.0]).is_result  # one seed
    assert not gap([1.0, 1.0], [1.0, 1.0]).is_result and gap([1.0, 1.0], [0.0, 0.0]).is_result
