import lzma
from pathlib import Path

from openmythos.data.loader import TokenLoader
from openmythos.data.prepare import prepare
from openmythos.demo.text import marks, text_config
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.recipe import TextData


def test_act_1_is_the_preset_on_real_text() -> None:
    config = text_config(7, 12.0)
    assert config.data == TextData(source="python-docs", seq_len=config.data.seq_len)
    assert config.train.max_seconds == 12.0 and config.train.max_steps is None
    assert config.train.seed == 7


def test_other_compressors_read_the_held_out_text_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(40):
        text = f"{i * 7919 % 1000} " + "the loop said that it would say it again; " * (1 + i % 3)
        (tmp_path / "in" / f"{i}.txt").write_text(text)
    prepare(str(tmp_path / "in"), tmp_path / "out", tokenizer=byte_tokenizer())
    train, held_out = (
        TokenLoader(tmp_path / "out", split, seq_len=16, batch_size=2) for split in ("train", "val")
    )
    assert len(held_out.text()) == held_out.num_bytes < train.num_bytes
    found = marks(train.text(), held_out.text())
    size = len(lzma.compress(held_out.text(), preset=9))
    assert found["xz -9"] == 8 * size / held_out.num_bytes
    assert found["xz -9 after the training text"] < found["xz -9"] / 2
    assert found["gzip -9"] > 0
