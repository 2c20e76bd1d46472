"""The page at ``/``: its files, and what it offers for a model beyond OpenAI's API.

The page is plain HTML, CSS and one module of JavaScript. It asks no other host for anything, and a
Content-Security-Policy keeps the browser from doing so.
"""

from dataclasses import MISSING, fields
from importlib import resources
from typing import Any

from fastapi import APIRouter, Response

from openmythos.data.synthetic import Walks
from openmythos.eval.puzzle import PuzzleCodec, puzzle_documents
from openmythos.model.exit import EXIT_RULES, Rule
from openmythos.serve.served import ServedModel

MOST_HOPS, WALKS_EACH = 12, 4
COMMON = {field.name for field in fields(Rule)}  # what every rule has
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # the page of the version that runs
}


def page_files() -> APIRouter:
    """The routes of the page's files, which are read once."""
    router = APIRouter()
    folder = resources.files("openmythos.serve").joinpath("page")
    for path, (name, kind) in FILES.items():
        _add_file(router, path, folder.joinpath(name).read_bytes(), kind)
    return router


def _add_file(router: APIRouter, path: str, data: bytes, kind: str) -> None:
    @router.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def file() -> Response:
        return Response(data, headers={**HEADERS, "content-type": kind})


def offer(served: ServedModel) -> dict[str, Any]:
    """What the page offers for a model: exit rules that it can follow, and puzzles."""
    has_head = served.model.config.halting is not None
    rules = [rule for rule in EXIT_RULES.values() if has_head or not rule.needs_halting]
    return {
        "model": served.name,
        "default_rule": served.default_rule and served.default_rule.kind,
        "exit_rules": [{"kind": rule.kind, "fields": _fields(rule)} for rule in rules],
        "puzzles": puzzles(served),
    }


def puzzles(served: ServedModel) -> list[dict[str, Any]]:
    """Walks of 1 to 12 hops with their answers, held out from training; empty: no walks here."""
    walks = served.codec.puzzle if isinstance(served.codec, PuzzleCodec) else None
    if not isinstance(walks, Walks):
        return []
    return [
        {
            "hops": hops,
            "trained": hops <= walks.config.max_train_hops,
            "prompt": document["context"],
            "answer": document["target"].strip(),
        }
        for hops in range(1, min(MOST_HOPS, served.max_len - 2) + 1)
        for document in puzzle_documents(walks, hops, WALKS_EACH)
    ]


def _fields(rule: type[Rule]) -> list[dict[str, Any]]:
    """The numbers of a rule, its own first, as the page's form needs them."""
    found = sorted(fields(rule), key=lambda field: field.name in COMMON)
    return [
        {
            "name": field.name,
            "default": None if field.default is MISSING else field.default,
            "integer": field.type is int,
        }
        for field in found
        if rule.kind != "fixed"
    ]
