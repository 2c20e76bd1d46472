import pytest

from openmythos.config.adapter import AdapterConfig


def test_the_scale_is_alpha_by_rank() -> None:
    assert AdapterConfig(rank=4, alpha=6.0).scale == 1.5


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter\.rank is 0; it must be at least 1"):
        AdapterConfig(rank=0)
    with pytest.raises(ValueError, match=r"adapter\.alpha is -1\.0; it must be above 0"):
        AdapterConfig(alpha=-1.0)
    with pytest.raises(ValueError, match=r"adapter\.alpha is inf; it must be above 0, and finite"):
        AdapterConfig(alpha=float("inf"))
