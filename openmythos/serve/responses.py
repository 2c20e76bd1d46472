"""``POST /v1/responses``: conversations are answered in OpenAI's newer form; nothing is stored."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from openmythos.engine import request as engine
from openmythos.serve.answer import Answer, chat_logprobs, loop_counts
from openmythos.serve.chat import BASE_MODEL
from openmythos.serve.error import APIError
from openmythos.serve.reply import all_ended, warnings
from openmythos.serve.schema import (
    MAX_TOP,
    ROLES,
    Body,
    Choices,
    ContentPart,
    Count,
    Generation,
    ListOf,
    Message,
    refuse,
)
from openmythos.serve.served import ServedModel
from openmythos.serve.stream import EventStream, unless_gone

LOGPROBS = "message.output_text.logprobs"


class InputItem(Body):
    """A message of the input."""

    type: str = "message"
    role: str = "user"
    content: str | ListOf[ContentPart] | None = None


class Reasoning(Body):
    """How much to think."""

    effort: str | None = None
    summary: str | None = None


class ResponsesBody(Generation):
    """``POST /v1/responses``."""

    input: str | ListOf[InputItem]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    reasoning: Reasoning | None = None
    text: dict[str, Any] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    include: ListOf[str] | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    prompt: Any = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        """Refuse what is not offered.

        Raises:
            APIError: A field asks for it.
        """
        choice = None if self.tool_choice in ("none", "auto") else self.tool_choice
        refuse(
            store=self.store,
            previous_response_id=self.previous_response_id,
            conversation=self.conversation,
            background=self.background,
            tools=self.tools,
            tool_choice=choice,
            prompt=self.prompt,
        )
        kind = ((self.text or {}).get("format") or {}).get("type", "text")
        if kind != "text":
            said = f"text.format {kind!r} is not offered; only text is"
            raise APIError(400, said, param="text.format")
        if self.truncation not in (None, "disabled"):
            raise APIError(400, "only truncation: disabled is offered", param="truncation")
        foreign = set(self.include or ()) - {LOGPROBS}
        if foreign:
            said = f"include {sorted(foreign)[0]!r} is not offered; allowed: {LOGPROBS}"
            raise APIError(400, said, param="include")

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report with each token; None: no report."""
        wanted = self.top_logprobs is not None or LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if wanted else None

    def messages(self) -> list[Message]:
        """The conversation.

        Raises:
            APIError: An item is no message.
        """
        items = [InputItem(content=self.input)] if isinstance(self.input, str) else self.input
        if self.instructions is not None:
            items = [InputItem(role="system", content=self.instructions), *items]
        for item in items:
            if item.type != "message" or item.role not in ROLES:
                what = item.type if item.type != "message" else f"role {item.role}"
                raise APIError(400, f"input of the {what!r} is not offered", param="input")
        return [
            Message.model_validate(item.model_dump(include={"role", "content"})) for item in items
        ]

    def choices(self) -> Choices:
        """The fields that the other forms have too."""
        fields = {name: getattr(self, name) for name in Generation.model_fields}
        effort = None if self.reasoning is None else self.reasoning.effort
        if effort is not None and self.reasoning_effort not in (None, effort):
            said = "reasoning.effort and reasoning_effort differ; give one"
            raise APIError(400, said, param="reasoning.effort")
        return Choices(**{**fields, "reasoning_effort": effort or self.reasoning_effort})


async def respond(served: ServedModel, body: ResponsesBody, request: Request) -> Response:
    """Answer a body.

    Raises:
        APIError: It cannot be answered.
    """
    body.check()
    prompt, stops = await asyncio.to_thread(served.encode_chat, body.messages())
    requests = served.requests(body.choices(), prompt, body.max_output_tokens, body.num_logprobs)
    headers = warnings(body, *([] if served.has_template else [BASE_MODEL]))
    reply = _Reply(served, body, requests[0])

    async def events() -> AsyncIterator[tuple[str, dict[str, Any]]]:
        number = 0
        async with served.answers(requests, stops, body) as answers:
            async for kind, fields in reply.events(answers[0]):
                yield kind, {"type": kind, "sequence_number": number, **fields}
                number += 1

    if body.stream:
        return EventStream(events(), headers, done=False)

    async def whole() -> dict[str, Any]:
        async with served.answers(requests, stops, body) as answers:
            await all_ended(answers)
            return reply.ended(answers[0])

    return JSONResponse(await unless_gone(whole(), request.receive), headers=headers)


class _Reply:
    """The response object, and the events in which it comes."""

    def __init__(self, served: ServedModel, body: ResponsesBody, asked: engine.Request) -> None:
        self.served, self.body, self.sampling = served, body, asked.sampling
        self.num_prompt, self.num_loops = len(asked.tokens), asked.num_loops or 0
        self.id, self.item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def events(self, answer: Answer) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The kind and the fields of each event."""
        where = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        begun = self._response("in_progress", [], None)
        yield "response.created", {"response": begun}
        yield "response.in_progress", {"response": begun}
        item = {**self._message(answer, "in_progress"), "content": []}
        yield "response.output_item.added", {"output_index": 0, "item": item}
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield "response.content_part.added", {**where, "part": empty}
        async for delta in answer.deltas():
            if delta.text or delta.tokens:
                entries = self._logprobs(answer) if self.body.num_logprobs is not None else []
                told = {**where, "delta": delta.text, "logprobs": entries[-len(delta.tokens) :]}
                if self.body.include_loops:
                    told["loops"] = [token.num_loops for token in delta.tokens]
                yield "response.output_text.delta", told
        part = self._part(answer)
        done = {**where, "text": answer.text, "logprobs": part["logprobs"]}
        yield "response.output_text.done", done
        yield "response.content_part.done", {**where, "part": part}
        whole = self.ended(answer)
        yield "response.output_item.done", {"output_index": 0, "item": whole["output"][0]}
        yield f"response.{whole['status']}", {"response": whole}

    def ended(self, answer: Answer) -> dict[str, Any]:
        """The response after the answer's end."""
        status = "incomplete" if answer.finish_reason == "length" else "completed"
        usage = self._usage(answer)
        return self._response(status, [self._message(answer, status)], usage)

    def _message(self, answer: Answer, status: str) -> dict[str, Any]:
        message = {"id": self.item_id, "type": "message", "role": "assistant", "status": status}
        if self.body.include_loops:
            message["loops"] = [token.num_loops for token in answer.tokens]  # type: ignore[assignment]
        return {**message, "content": [self._part(answer)]}

    def _part(self, answer: Answer) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": answer.text,
            "annotations": [],
            "logprobs": self._logprobs(answer) if self.body.num_logprobs is not None else [],
        }

    def _logprobs(self, answer: Answer) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = chat_logprobs(answer.tokens, self.served.codec)["content"]
        return entries

    def _usage(self, answer: Answer) -> dict[str, Any]:
        loops, count = [token.num_loops for token in answer.tokens], len(answer.tokens)
        usage: dict[str, Any] = {
            "input_tokens": self.num_prompt,
            "input_tokens_details": {
                "cached_tokens": answer.ticket.num_cached,
                "cache_write_tokens": 0,
            },
            "output_tokens": count,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_prompt + count,
        }
        if self.body.include_loops:
            # The loops of the prompt's last token are those of the first new one.
            num_read = max(0, self.num_prompt - 1 - answer.ticket.num_cached)
            usage["loops"] = loop_counts(loops, num_read * self.num_loops)
        return usage

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        body = self.body
        effort = None if body.reasoning is None else body.reasoning.effort
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        top_p = 1.0 if self.sampling.top_p is None else self.sampling.top_p
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.served.name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": effort or body.reasoning_effort, "summary": None},
            "store": False,
            "temperature": self.sampling.temperature,
            "presence_penalty": self.sampling.presence_penalty,
            "frequency_penalty": self.sampling.frequency_penalty,
            "top_logprobs": body.num_logprobs or 0,
            "max_tool_calls": None,
            "service_tier": "default",
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
            "metadata": body.metadata or {},
        }
