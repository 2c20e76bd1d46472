"""The page at ``/``: its files, and what it offers for a model beyond OpenAI's API.

The page is plain HTML, CSS and one module of JavaScript. It asks no other host for anything, and a
Content-Security-Policy keeps the browser from doing so.
"""

from dataclasses import MISSING, fields
from importlib import resources
from typing import Any

from fastapi import APIRouter, Response

from openmythos.data.puzzle import Puzzle
from openmythos.eval.puzzle import puzzle_documents
from openmythos.model.exit import EXIT_RULES, Rule
from openmythos.serve.served import ServedModel

NUM_SIZES, EACH_SIZE = 12, 4
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
        "puzzle": puzzle_of(served),
        "puzzles": puzzles(served),
    }


def puzzle_of(served: ServedModel) -> dict[str, Any] | None:
    """What the page says of the puzzle that a model knows; None if it reads text."""
    puzzle = served.puzzle
    if puzzle is None:
        return None
    return {
        "kind": puzzle.kind,
        "noun": puzzle.noun,
        "size_word": puzzle.size_word,
        "explained": puzzle.explained,
        "max_train_size": puzzle.max_train_size,
    }


def puzzles(served: ServedModel) -> list[dict[str, Any]]:
    """Puzzles of growing size with their answers, held out from training; empty: none here."""
    puzzle = served.puzzle
    if puzzle is None:
        return []
    return [
        {
            "size": size,
            "trained": size <= puzzle.max_train_size,
            "prompt": document["context"],
            "answer": document["target"].strip(),
        }
        for size in sizes_of(puzzle, served.max_len)
        for document in puzzle_documents(puzzle, size, EACH_SIZE)
    ]


def sizes_of(puzzle: Puzzle, max_len: int) -> list[int]:
    """About a dozen sizes, from the least to half as large again as training's, that fit."""
    most = -(-3 * puzzle.max_train_size // 2)
    most = most if puzzle.max_size is None else min(most, puzzle.max_size)
    fit = [
        size
        for size in range(puzzle.least_size, most + 1)
        if puzzle.num_tokens(size) < max_len  # the answer's last token comes, too
    ]
    if len(fit) <= NUM_SIZES:
        return fit
    spread = {fit[place * (len(fit) - 1) // (NUM_SIZES - 1)] for place in range(NUM_SIZES)}
    return sorted(spread | {puzzle.max_train_size} & {*fit})


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
