from openmythos.demo.text import text_config
from openmythos.train.recipe import TextData


def test_act_1_is_the_preset_on_real_text() -> None:
    config = text_config(7, 12.0)
    assert config.data == TextData(source="python-docs", seq_len=config.data.seq_len)
    assert config.train.max_seconds == 12.0 and config.train.max_steps is None
    assert config.train.seed == 7
