from pathlib import Path

import pytest

from openmythos.command import decoding
from openmythos.engine.sampling import SamplingConfig
from openmythos.report.page import LoopScale
from openmythos.text_stream import decode_pieces
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.foreign import END, backend, write_folder


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    tokenizer = byte_tokenizer()
    pieces = decode_pieces(tokenizer, tokenizer.encode("aé€"))
    shown = [decoding.coloured([piece], [2] * 6, LoopScale(1, 4)) for piece in pieces]
    assert [text.plain for text in shown] == ["a", "é", "€"]
    assert decoding.coloured(pieces, [2] * 6, LoopScale(1, 4)).plain == "aé€"


def test_what_is_not_obeyed_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"do_sample": True, "repetition_penalty": 1.1, "min_p": 0.05, "top_p": 0.9}
    asked |= {"no_repeat_ngram_size": 3}
    folder = write_folder(tmp_path, backend(END), generation_config=asked)
    greedy = SamplingConfig()
    found = decoding.sampling_of(Tokenizer.load(folder), greedy, None, None, None)
    assert (found.top_p, found.repetition_penalty) == (0.9, 1.1)
    told = capsys.readouterr()
    note = "note: the checkpoint asks for min_p=0.05, no_repeat_ngram_size=3, which is not obeyed"
    assert told.out == "" and told.err == f"{note} here\n"
    found = decoding.sampling_of(Tokenizer.load(folder), greedy, 0.0, None, None)
    assert (found.top_p, found.repetition_penalty) == (None, 1.1)
    assert "asks for no_repeat_ngram_size=3, which" in capsys.readouterr().err
    decoding.sampling_of(byte_tokenizer(), greedy, None, None, None)
    assert capsys.readouterr().err == ""
