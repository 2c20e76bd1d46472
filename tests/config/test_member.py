import dataclasses

import pytest

from openmythos.config import ModelConfig
from openmythos.config.member import Member
from openmythos.config.schema import require
from tests.strategies import small_config, unchecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide(Member):
    width: int

    def check(self, model: ModelConfig) -> None:
        require(self.width <= model.d_model, "width", self.width, f"at most {model.d_model}")


def test_a_member_fits_every_model_unless_it_says_otherwise():
    assert Member().check(small_config()) is None


def test_every_part_of_the_model_is_a_member():
    for part in vars(small_config()).values():
        assert isinstance(part, Member) == dataclasses.is_dataclass(part)


def test_the_models_config_asks_each_of_its_parts():
    with unchecked():
        assert small_config(block=Wide(width=16)).d_model == 16
        with pytest.raises(ValueError, match="width is 17; it must be at most 16"):
            small_config(block=Wide(width=17))
