"""Incremental decoding of token ids to text: complete characters, stop texts, token offsets."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from openmythos.config.schema import require


@runtime_checkable  # the tests check arguments
class ByteDecoder(Protocol):
    """Maps every id to a fixed string of bytes; ``Tokenizer`` is one."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The concatenated bytes of ``ids``; special tokens have none."""


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """A piece of decoded text that later tokens cannot change.

    Attributes:
        text: At least one character.
        start: The piece's offset in the whole text, in characters.
        tokens: Indices of the tokens that the piece was decoded from, counted from 0 in the order
            of ``push``. They are several if a character's bytes are split over tokens.
    """

    text: str
    start: int
    tokens: range


def decode_pieces(
    decoder: ByteDecoder, tokens: Iterable[int], stops: Sequence[str] = ()
) -> list[TextPiece]:
    """All pieces of a complete sequence of tokens."""
    stream = TextStream(decoder, stops)
    return [*(piece for token in tokens for piece in stream.push(token)), *stream.finish()]


class TextStream:
    """Decodes one token at a time; text that was returned is never taken back.

    The pieces together are the decoded text of all tokens, cut before the first stop text. Text is
    held back while a character's bytes are incomplete or while it may still become a stop text.
    Bytes that are not UTF-8 become U+FFFD.

    Args:
        decoder: Gives the bytes of a token.
        stops: Texts that end the output; they are not part of it.

    Attributes:
        text: All text returned so far.
        stopped: Whether a stop text was found; later tokens then return nothing.
    """

    def __init__(self, decoder: ByteDecoder, stops: Sequence[str] = ()) -> None:
        texts = not isinstance(stops, str) and all(isinstance(s, str) and s for s in stops)
        require(texts, "the stop text", stops, "a list of texts, none of them empty")
        self.text, self.stopped = "", False
        self._decoder, self._stops = decoder, tuple(stops)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[TextPiece] = []
        self._num_tokens, self._num_characters = 0, 0
        self._first = 0  # index of the token in which the next character begins

    def push(self, token: int) -> list[TextPiece]:
        """The text that is certain after one more token; empty after a stop text.

        Raises:
            ValueError: The decoder has no such token.
        """
        if self.stopped:
            return []
        data = self._decoder.decode_bytes([token])
        self._num_tokens += 1
        self._hold(self._utf8.decode(data))
        incomplete = len(self._utf8.getstate()[0])
        if incomplete <= len(data):  # the incomplete character, if any, began in this token
            self._first = self._num_tokens - (incomplete > 0)
        return self._release(final=False)

    def finish(self) -> list[TextPiece]:
        """The text that was held back. Call it once, after the last token."""
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
        """Release the held text up to a stop text or a possible beginning of one; keep the rest."""
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
        """Number of characters before the first stop text or possible beginning of one."""
        for start in range(len(text)):
            if any(text.startswith(stop, start) for stop in self._stops):
                self.stopped = True
                return start
            if not final and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
