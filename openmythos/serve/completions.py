"""``POST /v1/completions``: prompts are continued."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from openmythos.engine import request as engine
from openmythos.engine.sampling import Logprobs
from openmythos.serve.answer import Answer, Delta, completion_logprobs
from openmythos.serve.error import APIError
from openmythos.serve.reply import all_ended, head_of, merged, usage_of_body, warnings
from openmythos.serve.schema import CompletionBody
from openmythos.serve.served import ServedModel
from openmythos.serve.stream import EventStream, unless_gone


async def complete(served: ServedModel, body: CompletionBody, request: Request) -> Response:
    """Answer a body.

    Raises:
        APIError: It cannot be answered.
    """
    body.check()
    prompts = await asyncio.to_thread(lambda: [*map(served.encode, _prompts(body.prompt))])
    stops, with_usage = body.stops(), body.usage_in_stream()
    requests = [
        made
        for index, prompt in enumerate(prompts)
        for made in served.requests(
            body, prompt, body.max_tokens, body.logprobs, first_idx=index * body.n
        )
    ]
    head = head_of("cmpl", "text_completion", served)
    headers = warnings(body)
    num_prompt = sum(map(len, prompts))

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        async with served.answers(requests, stops, body) as answers:
            offsets = [0] * len(answers)
            async for index, delta in merged(answers):
                pairs = [(token.id, token.logprobs) for token in delta.tokens]
                choice = _choice(served, body, index, delta, pairs, offsets[index])
                offsets[index] += len(delta.text)
                yield {**head, "choices": [choice]}
            if with_usage:
                usage = usage_of_body(body, num_prompt, answers, requests[0].num_loops or 0)
                yield {**head, "choices": [], "usage": usage}

    if body.stream:
        return EventStream(chunks(), headers, done=True)

    async def whole() -> dict[str, Any]:
        async with served.answers(requests, stops, body) as answers:
            await all_ended(answers)
            choices = []
            for index, answer in enumerate(answers):
                choices.append(await _whole(served, body, index, answer, requests[index]))
            usage = usage_of_body(body, num_prompt, answers, requests[0].num_loops or 0)
            return {**head, "choices": choices, "usage": usage}

    return JSONResponse(await unless_gone(whole(), request.receive), headers=headers)


async def _whole(
    served: ServedModel, body: CompletionBody, index: int, answer: Answer, asked: engine.Request
) -> dict[str, Any]:
    """The choice of an answer that has ended, after its prompt if that is to be echoed."""
    pairs = [(token.id, token.logprobs) for token in answer.tokens]
    text = answer.text
    if body.echo:
        text = served.decode(asked.tokens) + text
        if body.logprobs is not None:
            own = await served.prompt_logprobs(asked, body.logprobs)
            pairs = [*zip(asked.tokens, own, strict=True), *pairs]
    told = Delta(text, tuple(answer.tokens), answer.finish_reason)
    return _choice(served, body, index, told, pairs)


def _choice(
    served: ServedModel,
    body: CompletionBody,
    index: int,
    delta: Delta,
    pairs: Sequence[tuple[int, Logprobs | None]],
    start: int = 0,
) -> dict[str, Any]:
    """A choice, or the next piece of one, which begins at a character of its text."""
    choice: dict[str, Any] = {
        "index": index,
        "text": delta.text,
        "finish_reason": delta.finish_reason,
        "logprobs": None,
    }
    if body.logprobs is not None:
        choice["logprobs"] = completion_logprobs(pairs, served.codec, start)
    if body.include_loops:
        choice["loops"] = [token.num_loops for token in delta.tokens]
    return choice


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt, text or ids, or several."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise APIError(400, "prompt is an empty list; give at least one prompt", param="prompt")
    return list(given)  # type: ignore[arg-type]
