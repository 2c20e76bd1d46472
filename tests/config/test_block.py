import pytest

from openmythos.config import BlockConfig


def test_bad_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"norm_eps is 0\.0; it must be above 0"):
        BlockConfig(norm_eps=0.0)
