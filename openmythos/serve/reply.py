"""Parts of every answer: its head, what was ignored, the usage, several choices at once."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from openmythos.serve.answer import Answer, usage_of
from openmythos.serve.error import APIError
from openmythos.serve.schema import Body, Choices
from openmythos.serve.served import ServedModel


def head_of(prefix: str, kind: str, served: ServedModel) -> dict[str, Any]:
    """What every answer of this kind begins with."""
    number = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": served.name}


def warnings(body: Body, *warnings: str) -> dict[str, str]:
    """The header that says what was ignored."""
    unknown = body.unknown()
    said = [*warnings, *([f"ignored: {', '.join(unknown)}"] if unknown else [])]
    text = "; ".join(said).encode("ascii", "replace").decode()
    # A space at either end, as after a field without a name, is no valid header.
    line = "".join(c for c in text if c.isprintable())[:1000].strip()
    return {"x-warning": line} if said else {}


def usage_of_body(
    body: Choices, num_prompt: int, answers: Sequence[Answer], num_loops: int
) -> dict[str, Any]:
    """The usage of a body's answers."""
    firsts = answers[:: body.n]  # the first choice of each prompt reads it, the others find it
    cached = sum(answer.ticket.num_cached for answer in firsts)
    # The loops of a prompt's last token are those of the first new one.
    loops = max(0, num_prompt - len(firsts) - cached) * num_loops
    return usage_of(num_prompt, cached, answers, body.include_loops, loops)


async def merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Any]]:
    """The deltas of several answers, each as soon as it comes."""
    ready: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def read(index: int, answer: Answer) -> None:
        try:
            async for delta in answer.deltas():
                await ready.put((index, delta))
        except APIError as error:
            await ready.put((index, error))

    readers = [asyncio.ensure_future(read(*pair)) for pair in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            index, delta = await ready.get()
            if isinstance(delta, APIError):
                raise delta
            yield index, delta
            left -= delta.finish_reason is not None
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def all_ended(answers: Sequence[Answer]) -> None:
    """Read several answers to their ends.

    Raises:
        APIError: The engine ended one with an error.
    """
    async for _ in merged(answers):
        pass
