"""Token ids to text while they come: whole characters, stop texts, and where each piece is from."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from openmythos.config.schema import require


@runtime_checkable  # the tests check arguments
class ByteDecoder(Protocol):
    """Ids to bytes, each id always to the same ones; ``Tokenizer`` is one."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``, one after the other; a special token has none."""


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """Characters that will not change any more.

    Attributes:
        text: At least one character.
        start: Characters of the text before it.
        tokens: Places, in the order of ``push`` and from 0, of the tokens whose bytes were read for
            it: several where a character is cut over tokens.
    """

    text: str
    start: int
    tokens: range


def decode_pieces(
    decoder: ByteDecoder, tokens: Iterable[int], stops: Sequence[str] = ()
) -> list[TextPiece]:
    """The pieces of a text whose tokens are all there."""
    stream = TextStream(decoder, stops)
    return [*(piece for token in tokens for piece in stream.push(token)), *stream.finish()]


class TextStream:
    """Decodes token by token; what it has given is never taken back.

    The pieces together are the decoded text of all tokens, cut before the stop text that begins
    first. A character's bytes wait until it is complete, and so does what may yet become a stop
    text. Bytes that are not UTF-8 become U+FFFD.

    Args:
        decoder: Gives the bytes of a token.
        stops: Texts that end the text and do not belong to it.

    Attributes:
        text: All that was given so far.
        stopped: Whether a stop text was found; later tokens then give nothing.
    """

    def __init__(self, decoder: ByteDecoder, stops: Sequence[str] = ()) -> None:
        texts = not isinstance(stops, str) and all(isinstance(s, str) and s for s in stops)
        require(texts, "stops", stops, "a list of texts that are not empty")
        self.text, self.stopped = "", False
        self._decoder, self._stops = decoder, tuple(stops)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[TextPiece] = []
        self._num_tokens, self._num_characters = 0, 0
        self._first = 0  # the token that the next character begins in

    def push(self, token: int) -> list[TextPiece]:
        """What is certain after one more token; nothing once stopped.

        Raises:
            ValueError: The decoder has no such token.
        """
        if self.stopped:
            return []
        data = self._decoder.decode_bytes([token])
        self._num_tokens += 1
        self._hold(self._utf8.decode(data))
        incomplete = len(self._utf8.getstate()[0])
        if incomplete <= len(data):  # it began in this token, if there is anything
            self._first = self._num_tokens - (incomplete > 0)
        return self._release(final=False)

    def finish(self) -> list[TextPiece]:
        """What waited for tokens that will not come. Call it once, after the last one."""
        if self.stopped:
            return []
        self._hold(self._utf8.decode(b"", final=True))
        return self._release(final=True)

    def _hold(self, text: str) -> None:
        if text:
            tokens = range(self._first, self._num_tokens)
            self._held.append(TextPiece(text=text, start=self._num_characters, tokens=tokens))
            self._num_characters += len(text)

    def _release(self, *, final: bool) -> list[TextPiece]:
        """The held text up to a stop text, or up to what may become one; the rest is kept."""
        end = self._certain("".join(piece.text for piece in self._held), final)
        pieces, kept = [], []
        for piece in self._held:
            size = min(len(piece.text), end)
            end -= size
            before, after = piece.text[:size], piece.text[size:]
            if before:
                pieces.append(replace(piece, text=before))
            if after:
                kept.append(replace(piece, text=after, start=piece.start + size))
        self._held = kept
        self.text += "".join(piece.text for piece in pieces)
        return pieces

    def _certain(self, text: str, final: bool) -> int:
        """Characters before the first place where a stop text stands or may still come to stand."""
        for start in range(len(text)):
            if any(text.startswith(stop, start) for stop in self._stops):
                self.stopped = True
                return start
            if not final and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
