"""An answer as it grows: from tokens to text, log-probabilities and loops."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openmythos.engine.engine import Event
from openmythos.engine.sampling import Logprobs
from openmythos.serve.error import APIError
from openmythos.serve.worker import EngineThread, Ticket
from openmythos.text_stream import ByteDecoder, TextStream


@dataclass(frozen=True)
class Token:
    """A generated token: its id, loops and, if asked for, log-probabilities."""

    id: int
    num_loops: int
    logprobs: Logprobs | None


@dataclass(frozen=True)
class Delta:
    """Text that has become certain, and the tokens since the last delta.

    Attributes:
        text: May be empty in the last delta of an answer.
        tokens: Those whose text this is; a token that is only part of a character waits for it.
        finish_reason: ``stop`` or ``length`` in the last delta of an answer.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None = None


@dataclass
class Answer:
    """One choice: reads the events of its ticket.

    Attributes:
        tokens: All tokens so far.
        text: All text so far.
        finish_reason: Why it ended; None: it has not.
    """

    worker: EngineThread
    ticket: Ticket
    decoder: ByteDecoder
    stops: Sequence[str]
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self._stream = TextStream(self.decoder, self.stops)
        self._num_told = 0

    @property
    def text(self) -> str:
        """All text so far."""
        return self._stream.text

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answer piece by piece; the last has a ``finish_reason``.

        Raises:
            APIError: The engine ended the request with an error.
        """
        while self.finish_reason is None:
            text, reason = self._take(await self.ticket.events.get())
            if reason is not None:  # a stop text ends it before the engine does
                self.finish_reason = reason
                self.worker.close(self.ticket, reason)
            if text or reason is not None:
                tokens = tuple(self.tokens[self._num_told :])
                self._num_told = len(self.tokens)
                yield Delta(text, tokens, reason)

    def _take(self, event: Event) -> tuple[str, Literal["stop", "length"] | None]:
        """The text that has become certain, and why the answer ends, if it does."""
        if event.finish_reason == "error":
            raise APIError(500, event.error or "the engine failed", code="engine_error")
        pieces = []
        if event.token is not None:
            self.tokens.append(Token(event.token, event.num_loops, event.logprobs))
            pieces += self._stream.push(event.token)
        if not self._stream.stopped and event.finish_reason is not None:
            pieces += self._stream.finish()
        text = "".join(piece.text for piece in pieces)
        if self._stream.stopped or event.finish_reason == "stop":
            return text, "stop"
        # A deadline or an abort from outside cut it short, as a limit of tokens does.
        return text, None if event.finish_reason is None else "length"


def usage_of(
    num_prompt: int,
    num_cached: int,
    answers: Sequence[Answer],
    include_loops: bool,
    prompt_loops: int,
) -> dict[str, Any]:
    """The usage in OpenAI's form; ``loops`` is ours."""
    tokens = [token for answer in answers for token in answer.tokens]
    usage: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(tokens),
        "total_tokens": num_prompt + len(tokens),
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": 0},  # loops are no tokens
    }
    if include_loops:
        usage["loops"] = loop_counts([token.num_loops for token in tokens], prompt_loops)
    return usage


def loop_counts(loops: Sequence[int], prompt_loops: int) -> dict[str, int | float]:
    """The loops of an answer's tokens, together, and of its prompt."""
    return {
        "total": sum(loops),
        "mean": sum(loops) / len(loops) if loops else 0.0,
        "max": max(loops, default=0),
        "prompt": prompt_loops,
    }


def chat_logprobs(tokens: Sequence[Token], decoder: ByteDecoder) -> dict[str, Any]:
    """``logprobs`` of a chat completion's choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = decoder.decode_bytes([token])
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(data)}

    content = []
    for token in tokens:
        if token.logprobs is not None:
            top = [entry(*pair) for pair in token.logprobs.top]
            content.append({**entry(token.id, token.logprobs.chosen), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[tuple[int, Logprobs | None]], decoder: ByteDecoder, start: int = 0
) -> dict[str, Any]:
    """``logprobs`` of a completion's choice; ``start`` is the offset of its first character.

    A token without log-probabilities, such as the first of an echoed prompt, has null.
    """
    texts, chosen, tops, offsets = [], [], [], []
    for token, report in tokens:
        text = decoder.decode_bytes([token]).decode("utf-8", "replace")
        texts.append(text)
        offsets.append(start)
        start += len(text)
        chosen.append(None if report is None else finite(report.chosen))
        tops.append(None if report is None else _by_text(report, decoder))
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


def _by_text(report: Logprobs, decoder: ByteDecoder) -> dict[str, float]:
    top: dict[str, float] = {}
    for token, logprob in report.top:  # in descending order: the first of equal texts counts
        top.setdefault(decoder.decode_bytes([token]).decode("utf-8", "replace"), finite(logprob))
    return top


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, -9999.0)
