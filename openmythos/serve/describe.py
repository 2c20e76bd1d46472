"""The schema at ``/openapi.json``: what every route answers, with each error by its status."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

PLAIN = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": PLAIN,
                "code": PLAIN,
            },
        }
    },
}
EVENT = {  # of a stream
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
STATUSES = {
    400: "The request is wrong; the message says how.",
    401: "No valid key was given.",
    404: "There is no such model.",
    405: "The route has no such method.",
    408: "The body took too long.",
    413: "The body is too large.",
    429: "The queue is full; come again.",
    500: "The request failed in the model.",
    503: "The engine has ended, or the server is ending.",
}
STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def described(app: FastAPI, models: list[str]) -> dict[str, Any]:
    """The application's schema; made once. ``models`` are the names that there are."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for schema in schemas.values():
            _name_models(schema.get("properties", {}).get("model", {}), models)
        schemas["Error"] = ERROR
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for path, methods in made["paths"].items():
            for operation in methods.values():
                for parameter in operation.get("parameters", ()):
                    _name_models(parameter["schema"], models)
                answers = operation["responses"]
                answers.pop("422", None)  # mistakes are 400
                guarded = path.startswith("/v1/") or path in ("/tokenize", "/detokenize")
                for status, said in STATUSES.items() if guarded else ():
                    answers[str(status)] = {"description": said, "content": content}
                if path in STREAMS:
                    answers["200"]["content"]["text/event-stream"] = {"schema": EVENT}
        state = {"description": "An engine has ended.", "content": {"application/json": {}}}
        for path in ("/health", "/ready"):
            made["paths"][path]["get"]["responses"]["503"] = state
        text = {"text/plain": {"schema": {"type": "string"}}}
        made["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = text
        app.openapi_schema = made
    return app.openapi_schema


def _name_models(schema: dict[str, Any], models: list[str]) -> None:
    """Restrict text, or text or nothing, to the names of models."""
    for kind in [schema, *schema.get("anyOf", ())]:
        if kind.get("type") == "string":
            kind["enum"] = models
