"""The routes of the server."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from openmythos import __version__
from openmythos.serve.answer import (
    Answer,
    chat_logprobs,
    completion_logprobs,
    usage_of,
)
from openmythos.serve.error import APIError
from openmythos.serve.metrics import Metrics
from openmythos.serve.page import offer, page_files
from openmythos.serve.schema import (
    Body,
    ChatBody,
    Choices,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from openmythos.serve.served import ServedModel
from openmythos.serve.stream import ClientGone, EventStream, unless_gone

HUNG_UP = 499  # nginx' word for it; nobody sees it
BASE_MODEL = "this model has no chat template: it continues a plain transcript"


def make_app(models: Sequence[ServedModel], metrics: Metrics) -> FastAPI:
    """The application that serves these models; the first answers where no model is named."""
    app = FastAPI(title="OpenMythos", version=__version__, docs_url=None, redoc_url=None)
    by_name = {model.name: model for model in models}

    def model_named(name: str | None) -> ServedModel:
        if name is None:
            return models[0]
        if name not in by_name:
            said = f"there is no model {name!r}; allowed: {', '.join(by_name)}"
            raise APIError(404, said, param="model", code="model_not_found")
        return by_name[name]

    _add_errors(app)
    _add_state(app, models, metrics)
    app.include_router(page_files())

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models, with their depths."""
        return {"object": "list", "data": [model.card() for model in models]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """One model."""
        return model_named(name).card()

    @app.get("/v1/page")
    def page_offer(model: str | None = None) -> dict[str, Any]:
        """What the page at ``/`` offers for a model: exit rules, and puzzles with answers."""
        return offer(model_named(model))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        return await _complete(model_named(body.model), body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await _chat(model_named(body.model), body, request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """The token ids of a prompt or of messages."""
        model = model_named(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(400, "give a prompt or messages, one of them", param="prompt")
        if body.prompt is not None:
            ids = model.encode(body.prompt)
        else:
            ids, _ = model.encode_chat(body.messages or [])
        return {"tokens": ids, "count": len(ids), "max_model_len": model.max_len}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """The text of token ids."""
        return {"prompt": model_named(body.model).decode(body.tokens)}

    return app


def _add_state(app: FastAPI, models: Sequence[ServedModel], metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while all engines run."""
        dead = [model.name for model in models if not model.worker.is_alive]
        body = {"status": "dead" if dead else "ok", "dead": dead}
        return JSONResponse(body, status_code=503 if dead else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """200 when requests are taken."""
        return await health()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The program's version."""
        return {"version": __version__}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Prometheus' text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        said = f"{where}: {first['msg']}" if where else str(first["msg"])
        wrong = APIError(400, said, param=where or None)
        return JSONResponse(wrong.body, status_code=400, headers=wrong.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        wrong = APIError(error.status_code, f"{request.url.path}: {error.detail}")
        headers = {**(error.headers or {}), **wrong.headers}
        return JSONResponse(wrong.body, status_code=error.status_code, headers=headers)

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> Response:
        wrong = APIError(400, "the body is nested too deeply")
        return JSONResponse(wrong.body, status_code=400, headers=wrong.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=HUNG_UP)


# --- completions ----------------------------------------------------------------------------------


async def _complete(served: ServedModel, body: CompletionBody, request: Request) -> Response:
    body.check()
    prompts = [served.encode(prompt) for prompt in _prompts(body.prompt)]
    stops, with_usage = body.stops(), body.usage_in_stream()
    requests = [
        made
        for index, prompt in enumerate(prompts)
        for made in served.requests(
            body, prompt, body.max_tokens, body.logprobs, first_idx=index * body.n
        )
    ]
    head = _head("cmpl", "text_completion", served)
    headers = _warnings(body)
    num_prompt = sum(map(len, prompts))

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        async with served.answers(requests, stops) as answers:
            offsets = [0] * len(answers)
            async for index, delta in _merged(answers):
                choice: dict[str, Any] = {
                    "index": index,
                    "text": delta.text,
                    "finish_reason": delta.finish_reason,
                    "logprobs": None,
                }
                if body.logprobs is not None:
                    pairs = [(token.id, token.logprobs) for token in delta.tokens]
                    choice["logprobs"] = completion_logprobs(pairs, served.codec, offsets[index])
                offsets[index] += len(delta.text)
                if body.include_loops:
                    choice["loops"] = [token.num_loops for token in delta.tokens]
                yield {**head, "choices": [choice]}
            if with_usage:
                usage = _usage(body, num_prompt, answers, requests[0].num_loops or 0)
                yield {**head, "choices": [], "usage": usage}

    if body.stream:
        return EventStream(chunks(), headers, done=True)

    async def whole() -> dict[str, Any]:
        async with served.answers(requests, stops) as answers:
            choices = []
            for index, answer in enumerate(answers):
                await answer.whole()
                choices.append(await _completion_choice(served, body, index, answer, requests))
            usage = _usage(body, num_prompt, answers, requests[0].num_loops or 0)
            return {**head, "choices": choices, "usage": usage}

    return JSONResponse(await unless_gone(whole(), request.receive), headers=headers)


async def _completion_choice(
    served: ServedModel, body: CompletionBody, index: int, answer: Answer, requests: Sequence[Any]
) -> dict[str, Any]:
    request = requests[index]
    pairs = [(token.id, token.logprobs) for token in answer.tokens]
    text = answer.text
    if body.echo:
        text = served.decode(request.tokens) + text
        if body.logprobs is not None:
            asked = (request.tokens, request.num_loops, request.seed, body.logprobs)
            own = await served.prompt_logprobs(*asked)
            pairs = [*zip(request.tokens, own, strict=True), *pairs]
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "finish_reason": answer.finish_reason,
        "logprobs": None,
    }
    if body.logprobs is not None:
        choice["logprobs"] = completion_logprobs(pairs, served.codec)
    if body.include_loops:
        choice["loops"] = [token.num_loops for token in answer.tokens]
    return choice


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt, text or ids, or several."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise APIError(400, "prompt is an empty list; give at least one prompt", param="prompt")
    return list(given)  # type: ignore[arg-type]


# --- chat -----------------------------------------------------------------------------------------


async def _chat(served: ServedModel, body: ChatBody, request: Request) -> Response:
    body.check()
    prompt, own_stops = served.encode_chat(body.messages)
    stops, with_usage = [*body.stops(), *own_stops], body.usage_in_stream()
    count = (body.top_logprobs or 0) if body.logprobs else None
    requests = served.requests(body, prompt, body.max_new_tokens(), count)
    headers = _warnings(body, *([] if served.has_template else [BASE_MODEL]))

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        head = _head("chatcmpl", "chat.completion.chunk", served)

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
            return {**head, "choices": [choice]}

        async with served.answers(requests, stops) as answers:
            for index in range(len(answers)):
                yield chunk(index, {"role": "assistant", "content": ""})
            async for index, delta in _merged(answers):
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
                usage = _usage(body, len(prompt), answers, requests[0].num_loops or 0)
                yield {**head, "choices": [], "usage": usage}

    if body.stream:
        return EventStream(chunks(), headers, done=True)

    async def whole() -> dict[str, Any]:
        async with served.answers(requests, stops) as answers:
            choices = []
            for index, answer in enumerate(answers):
                await answer.whole()
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
            usage = _usage(body, len(prompt), answers, requests[0].num_loops or 0)
            head = _head("chatcmpl", "chat.completion", served)
            return {**head, "choices": choices, "usage": usage}

    return JSONResponse(await unless_gone(whole(), request.receive), headers=headers)


# --- parts of both --------------------------------------------------------------------------------


def _head(prefix: str, kind: str, served: ServedModel) -> dict[str, Any]:
    number = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": served.name}


def _warnings(body: Body, *warnings: str) -> dict[str, str]:
    """The header that says what was ignored."""
    unknown = body.unknown()
    said = [*warnings, *([f"ignored: {', '.join(unknown)}"] if unknown else [])]
    text = "; ".join(said).encode("ascii", "replace").decode()
    return {"x-warning": "".join(c for c in text if c.isprintable())[:1000]} if said else {}


def _usage(
    body: Choices, num_prompt: int, answers: Sequence[Answer], num_loops: int
) -> dict[str, Any]:
    cached = min(num_prompt, sum(answer.ticket.num_cached for answer in answers))
    loops = (num_prompt - cached) * num_loops
    return usage_of(num_prompt, cached, answers, body.include_loops, loops)


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Any]]:
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
