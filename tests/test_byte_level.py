import pytest
import tokenizers
from tokenizers import decoders, models

from openmythos.byte_level import byte_characters, check_byte_level, mark_begin
from tests.foreign import END, backend


def test_every_byte_has_a_character_of_its_own() -> None:
    characters = byte_characters()
    assert len({*characters}) == len(characters) == 256
    assert characters[ord("a")] == "a" and characters[ord(" ")] == "Ġ"


def test_other_tokenizers_are_refused() -> None:
    assert check_byte_level(backend(END))["model"]["type"] == "BPE"
    other = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        check_byte_level(other)
    other.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="model WordLevel"):
        check_byte_level(other)


def test_a_begin_token_stands_before_every_text() -> None:
    made = backend(END)
    plain = made.encode("he").ids
    mark_begin(made, END)
    assert made.encode("he").ids == [made.token_to_id(END), *plain]
