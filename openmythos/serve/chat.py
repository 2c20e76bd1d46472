"""``POST /v1/chat/completions``: conversations are answered."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from openmythos.serve.answer import chat_logprobs
from openmythos.serve.reply import all_ended, head_of, merged, usage_of_body, warnings
from openmythos.serve.schema import ChatBody
from openmythos.serve.served import ServedModel
from openmythos.serve.stream import EventStream, unless_gone

BASE_MODEL = "this model has no chat template: it continues a plain transcript"


async def chat(served: ServedModel, body: ChatBody, request: Request) -> Response:
    """Answer a body.

    Raises:
        APIError: It cannot be answered.
    """
    body.check()
    prompt, own_stops = await asyncio.to_thread(served.encode_chat, body.messages)
    stops, with_usage = [*body.stops(), *own_stops], body.usage_in_stream()
    count = (body.top_logprobs or 0) if body.logprobs else None
    requests = served.requests(body, prompt, body.max_new_tokens(), count)
    headers = warnings(body, *([] if served.has_template else [BASE_MODEL]))

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        head = head_of("chatcmpl", "chat.completion.chunk", served)

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
            return {**head, "choices": [choice]}

        async with served.answers(requests, stops, body) as answers:
            for index in range(len(answers)):
                yield chunk(index, {"role": "assistant", "content": ""})
            async for index, delta in merged(answers):
                if delta.text or delta.tokens:
                    told = chunk(index, {"content": delta.text})
                    if body.logprobs:
                        told["choices"][0]["logprobs"] = chat_logprobs(delta.tokens, served.codec)
                    if body.include_loops:
                        told["choices"][0]["loops"] = [t.num_loops for t in delta.tokens]
                    yield told
                if delta.finish_reason is not None:
                    yield chunk(index, {}, delta.finish_reason)
            if with_usage:
                usage = usage_of_body(body, len(prompt), answers, requests[0].num_loops or 0)
                yield {**head, "choices": [], "usage": usage}

    if body.stream:
        return EventStream(chunks(), headers, done=True)

    async def whole() -> dict[str, Any]:
        async with served.answers(requests, stops, body) as answers:
            await all_ended(answers)
            choices = []
            for index, answer in enumerate(answers):
                choice: dict[str, Any] = {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "finish_reason": answer.finish_reason,
                    "logprobs": None,
                }
                if body.logprobs:
                    choice["logprobs"] = chat_logprobs(answer.tokens, served.codec)
                if body.include_loops:
                    choice["loops"] = [token.num_loops for token in answer.tokens]
                choices.append(choice)
            usage = usage_of_body(body, len(prompt), answers, requests[0].num_loops or 0)
            head = head_of("chatcmpl", "chat.completion", served)
            return {**head, "choices": choices, "usage": usage}

    return JSONResponse(await unless_gone(whole(), request.receive), headers=headers)
