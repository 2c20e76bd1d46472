"""The routes of the server."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from openmythos import __version__
from openmythos.serve.chat import chat
from openmythos.serve.completions import complete
from openmythos.serve.describe import described
from openmythos.serve.error import APIError
from openmythos.serve.metrics import Metrics
from openmythos.serve.page import offer, page_files
from openmythos.serve.reading import Readings
from openmythos.serve.responses import ResponsesBody, respond
from openmythos.serve.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ReadingAnswer,
    ReadingBody,
    TokenizeBody,
)
from openmythos.serve.served import ServedModel
from openmythos.serve.stream import ClientGone, unless_gone

HUNG_UP = 499  # nginx' word for it; nobody sees it


def make_app(models: Sequence[ServedModel], metrics: Metrics) -> FastAPI:
    """The application that serves these models; the first answers where no model is named."""
    app = FastAPI(title="OpenMythos", version=__version__, docs_url=None, redoc_url=None)
    by_name, readings = {model.name: model for model in models}, Readings()
    app.openapi = lambda: described(app, list(by_name))  # type: ignore[method-assign]

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
        return await complete(model_named(body.model), body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await chat(model_named(body.model), body, request)

    @app.post("/v1/responses")
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Answer a conversation, in the newer form; nothing is stored."""
        return await respond(model_named(body.model), body, request)

    @app.post("/v1/reading")
    async def reading(body: ReadingBody, request: Request) -> ReadingAnswer:
        """Which loop of a puzzle's model reads which token of its question."""
        return await unless_gone(readings.read(model_named(body.model), body), request.receive)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """The token ids of a prompt or of messages."""
        model = model_named(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(400, "give a prompt or messages, one of them", param="prompt")
        if body.prompt is not None:
            ids = await asyncio.to_thread(model.encode, body.prompt)
        else:
            ids, _ = await asyncio.to_thread(model.encode_chat, body.messages or [])
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
