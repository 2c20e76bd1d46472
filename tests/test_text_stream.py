"""Text that comes token by token against the text of all tokens, cut at the first stop text."""

import subprocess
import sys
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmythos.text_stream import TextPiece, TextStream, decode_pieces
from openmythos.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()


class Table:
    """Any strings of bytes, one per id."""

    def __init__(self, entries: Sequence[bytes]) -> None:
        self.entries = list(entries)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.entries[index] for index in ids)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def texts(pieces: Iterable[TextPiece]) -> list[str]:
    return [piece.text for piece in pieces]


# Characters of one to four bytes, cut anywhere, beside bytes that are no text at all.
SHREDS = [bytes([byte]) for byte in "abé€\U0001f600".encode()] + [
    b"",
    b"\xff",
    b"\xc0",
    b"\xf0\x9f",
]
ENTRIES = st.lists(st.sampled_from([*SHREDS, *(c.encode() for c in "abé€")]), max_size=4)
TABLES = st.lists(ENTRIES.map(b"".join), min_size=1, max_size=8)
STOPS = st.lists(st.text("abé€\ufffd", min_size=1, max_size=4), max_size=3)


@given(st.data(), TABLES, STOPS)
def test_a_stream_is_the_whole_text_cut_at_the_first_stop(
    data: st.DataObject, entries: list[bytes], stops: list[str]
) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(entries) - 1), max_size=12))
    decoder = Table(entries)
    whole = decoder.decode_bytes(tokens).decode("utf-8", errors="replace")
    expected = cut_at(whole, stops)
    stream, pieces = TextStream(decoder, stops), []
    for count, token in enumerate(tokens, start=1):
        pieces += stream.push(token)
        assert expected.startswith(stream.text)  # nothing is taken back
        if not stream.stopped:  # and no more is held back than may have to be
            seen = len(decoder.decode_bytes(tokens[:count]).decode("utf-8", errors="ignore"))
            assert len(stream.text) > seen - max(map(len, stops), default=1)
    pieces += stream.finish()
    assert "".join(texts(pieces)) == stream.text == expected
    assert stream.stopped == any(stop in whole for stop in stops)
    offset = 0
    for piece in pieces:
        assert piece.text and piece.start == offset
        offset += len(piece.text)
        assert 0 <= piece.tokens.start < piece.tokens.stop <= len(tokens)
        own = decoder.decode_bytes(tokens[index] for index in piece.tokens)
        assert piece.text in own.decode("utf-8", errors="replace")


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_text_of_the_byte_tokenizer(text: str, stops: list[str]) -> None:
    pieces = decode_pieces(BYTES, [BYTES.bos_id, *BYTES.encode(text), BYTES.eos_id], stops)
    assert "".join(texts(pieces)) == cut_at(text, stops)
    for piece in pieces:
        assert BYTES.decode([0, *BYTES.encode(text)][index] for index in piece.tokens) == piece.text


def test_a_character_of_several_tokens_comes_whole() -> None:
    assert decode_pieces(BYTES, BYTES.encode("aé€")) == [
        TextPiece(text="a", start=0, tokens=range(1)),
        TextPiece(text="é", start=1, tokens=range(1, 3)),
        TextPiece(text="€", start=2, tokens=range(3, 6)),
    ]


def test_a_token_may_end_one_character_and_begin_another() -> None:
    decoder = Table([b"a\xc3", b"\xa9b", b"\xe2\x82", b""])
    pieces = decode_pieces(decoder, [0, 1, 3, 2, 3])
    assert pieces == [
        TextPiece(text="a", start=0, tokens=range(1)),
        TextPiece(text="éb", start=1, tokens=range(2)),
        TextPiece(text="\ufffd", start=3, tokens=range(3, 5)),  # what the end leaves incomplete
    ]


def test_tokens_without_text_give_none() -> None:
    stream = TextStream(BYTES)
    assert stream.push(BYTES.bos_id) == [] == stream.push(BYTES.eos_id)
    assert stream.push(BYTES.encode("a")[0]) == [TextPiece(text="a", start=0, tokens=range(2, 3))]
    assert stream.finish() == [] and not stream.stopped


def test_what_may_become_a_stop_text_waits() -> None:
    stream = TextStream(BYTES, ["###"])
    given = {token: texts(stream.push(token)) for token in BYTES.encode("x")}
    assert list(given.values()) == [["x"]]
    hash_token, other = (BYTES.encode(text)[0] for text in "#y")
    assert [texts(stream.push(token)) for token in (hash_token, hash_token)] == [[], []]
    pieces = stream.push(other)  # it has not become one: each token gives its own
    assert texts(pieces) == ["#", "#", "y"]
    assert [list(piece.tokens) for piece in pieces] == [[1], [2], [3]]
    assert [piece.start for piece in pieces] == [1, 2, 3]
    for _ in range(3):
        assert stream.push(hash_token) == []
    assert stream.stopped and stream.text == "x##y"
    assert stream.push(other) == [] == stream.finish()


def test_a_stop_text_inside_a_token_cuts_it() -> None:
    stream = TextStream(Table([b"one END two"]), ["END", "two"])
    assert stream.push(0) == [TextPiece(text="one ", start=0, tokens=range(1))]
    assert stream.stopped


def test_the_stop_text_that_begins_first_cuts_wherever_tokens_end() -> None:
    for entries in ([b"xabcd"], [b"xabc", b"d"], [b"x", b"a", b"b", b"c", b"d"]):
        pieces = decode_pieces(Table(entries), range(len(entries)), ["bc", "abcd"])
        assert "".join(texts(pieces)) == "x"
    for entries in ([b"xabc", b"e"], [b"xabc"]):  # "abcd" never comes
        pieces = decode_pieces(Table(entries), range(len(entries)), ["bc", "abcd"])
        assert "".join(texts(pieces)) == "xa"


def test_the_end_gives_what_waited() -> None:
    assert texts(decode_pieces(BYTES, BYTES.encode("a##"), ["###"])) == ["a", "#", "#"]


@pytest.mark.parametrize("stops", ["END", ["a", ""]])
def test_stop_texts_are_texts(stops: object) -> None:
    with pytest.raises(ValueError, match=r"^the stop text is .*; it must be a list of texts"):
        TextStream(BYTES, stops)  # type: ignore[arg-type]


def test_no_torch_and_no_rich() -> None:
    program = (
        "import sys, openmythos.text_stream\n"
        "print([name for name in ('torch', 'rich', 'numpy') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ran.stdout == b"[]\n"
