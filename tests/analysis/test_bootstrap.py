import math

import pytest
import torch

from openmythos.analysis.bootstrap import defined, interval, resample


def test_samples_have_as_many_examples() -> None:
    times = resample(20, 500, seed=0)
    assert torch.equal(times.sum(dim=1), torch.full((500,), 20.0, dtype=torch.float64))
    assert torch.equal(times, resample(20, 500, seed=0))
    assert not torch.equal(times, resample(20, 500, seed=1))
    assert float((times == 0).double().mean()) == pytest.approx((1 - 1 / 20) ** 20, abs=0.02)


def test_interval_of_a_mean_is_two_standard_errors_wide() -> None:
    values = torch.arange(100, dtype=torch.float64)
    means = resample(100, 4000, seed=0) @ values / 100
    low, high = interval(means)
    error = float(values.std()) / 10
    assert (49.5 - low) / error == pytest.approx(1.96, abs=0.12)
    assert (high - 49.5) / error == pytest.approx(1.96, abs=0.12)


def test_undefined_values_are_left_out() -> None:
    assert interval(torch.tensor([math.nan, 2.0, 2.0])) == (2.0, 2.0)
    assert interval(torch.tensor([math.nan])) is None
    assert defined(math.nan) is None
    assert defined(0.5) == 0.5
