from openmythos.command import decoding
from openmythos.text_stream import decode_pieces
from openmythos.tokenizer import byte_tokenizer


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    tokenizer = byte_tokenizer()
    pieces = decode_pieces(tokenizer, tokenizer.encode("aé€"))
    shown = [decoding.coloured([piece], [2] * 6, 4) for piece in pieces]
    assert [text.plain for text in shown] == ["a", "é", "€"]
    assert decoding.coloured(pieces, [2] * 6, 4).plain == "aé€"
