"""The page's files and what it is offered; ``make test-page`` has it used in a browser."""

import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from openmythos.data.puzzle_table import CONFIGS, make_puzzle
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.eval.puzzle import PuzzleCodec, puzzle_documents
from openmythos.model.exit import EXIT_RULES, make_exit_rule
from openmythos.serve import page
from openmythos.tokenizer import byte_tokenizer
from tests.report.test_page import channels, contrast, over
from tests.serve.running import Running, running, small_model

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "openmythos/serve/page"
WALKS = Walks(HopsConfig())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    models = {
        "small": (small_model(), byte_tokenizer()),
        "walks": (small_model(vocab_size=WALKS.vocab_size), PuzzleCodec(WALKS)),
        "short": (small_model(vocab_size=WALKS.vocab_size, max_seq_len=8), PuzzleCodec(WALKS)),
    }
    with running(models, max_rows=2) as here:
        yield here


class Names(HTMLParser):
    """The ids, references and inline code of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.references += [given[name] or "" for name in ("src", "href") if name in given]
        inline = tag == "style" or (tag == "script" and "src" not in given)
        self.inline += [tag] if inline else []
        self.inline += [name for name in given if name == "style" or name.startswith("on")]


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def test_files_have_their_type_and_keep_the_browser_on_this_host(server: Running) -> None:
    for path, (name, kind) in page.FILES.items():
        answer = server.client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert answer.content == (FOLDER / name).read_bytes()
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = dict(
            part.strip().split(" ", 1)
            for part in answer.headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        own = ("script-src", "style-src", "img-src", "connect-src")
        assert {policy[name] for name in own} == {"'self'"}
        assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {
            "'none'"
        }
        head = server.client.head(path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == answer.headers["content-length"]


def test_nothing_refers_to_another_host() -> None:
    for name, _ in page.FILES.values():
        text = read(name).replace('"http://www.w3.org/2000/svg"', "")  # SVG's name, not an address
        assert not re.findall(r"(?:https?:)?//[\w-]+(?:\.[\w-]+)+", text), name
        assert not re.findall(r"@import|url\(|\bimport\s*\(|\bfrom\s+[\"']", text), name


def test_the_page_is_whole() -> None:
    names, script = Names(), read("page.js")
    names.feed(read("index.html"))
    assert names.inline == []  # the policy forbids it
    assert len(set(names.ids)) == len(names.ids)
    local = {path.lstrip("/") for path in page.FILES} | {f"#{name}" for name in names.ids}
    assert set(names.references) <= local
    used = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert used <= set(names.ids) and "prompt" in used
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", script
    )
    assert {path.name for path in FOLDER.iterdir()} == {name for name, _ in page.FILES.values()}


def test_the_files_are_in_the_wheel() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"] == {
        "packages": ["openmythos"]
    }  # all of it, but what git ignores
    assert not (FOLDER / "__init__.py").exists()


def test_other_paths_are_not_found(server: Running) -> None:
    for path in (
        "/page",
        "/page/",
        "/page/page.py",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/x",
    ):
        answer = server.client.get(path)
        assert answer.status_code == 404 and "error" in answer.json(), path


def test_puzzles_are_walks_with_their_ends(server: Running) -> None:
    offered = server.client.get("/v1/page", params={"model": "walks"}).json()
    assert offered["puzzle"] == {
        "kind": "hops",
        "noun": "walk",
        "size_word": "hops",
        "explained": WALKS.explained,
        "max_train_size": 8,
    }
    codec, hops = PuzzleCodec(WALKS), []
    for puzzle in offered["puzzles"]:
        walk = np.array([codec.encode(puzzle["prompt"])])
        assert puzzle["answer"] == codec.words[WALKS.entities_along(walk)[0, -1]]
        assert WALKS.is_held_out(walk, walk.shape[1] - 1)[0] == WALKS.holds_out(walk.shape[1] - 1)
        assert puzzle["trained"] == (puzzle["size"] <= 8)
        assert puzzle["size"] == walk.shape[1] - 1
        hops.append(puzzle["size"])
    assert sorted(hops) == sorted([*range(1, 13)] * page.EACH_SIZE)
    longest = max(offered["puzzles"], key=lambda puzzle: puzzle["size"])["prompt"]
    answer = server.post("/v1/completions", model="walks", prompt=longest, max_tokens=1)
    assert answer.status_code == 200


def test_a_short_model_gets_walks_that_fit(server: Running) -> None:
    puzzles = server.client.get("/v1/page", params={"model": "short"}).json()["puzzles"]
    longest = puzzles[-1]
    assert longest["size"] == 6
    answer = server.post("/v1/completions", model="short", prompt=longest["prompt"], max_tokens=1)
    assert answer.status_code == 200


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_puzzle_is_offered_with_its_answer(kind: str) -> None:
    """In words that its model reads, in sizes that fit, and the answer is the generator's."""
    puzzle = make_puzzle(CONFIGS[kind](), seed=3)
    codec = PuzzleCodec(puzzle)
    sizes = page.sizes_of(puzzle, max_len=200)
    assert puzzle.max_train_size in sizes and len(sizes) <= page.NUM_SIZES + 1
    assert sizes == sorted(set(sizes)) and sizes[0] == puzzle.least_size
    longest = puzzle.num_tokens(puzzle.max_train_size)
    assert max(page.sizes_of(puzzle, max_len=longest), default=0) < max(2, puzzle.max_train_size)
    for document in puzzle_documents(puzzle, puzzle.max_train_size, 3):
        question, answer = (codec.encode(document[name]) for name in ("context", "target"))
        whole = np.array([[*question, *answer[:-1]]])
        assert puzzle.targets(whole)[0, len(question) - 1 :].tolist() == answer
    sentence = puzzle.explained
    assert sentence[0].isupper() and sentence.endswith(".") and sentence.count(". ") == 0


def test_a_model_of_text_has_no_puzzles(server: Running) -> None:
    offered = server.client.get("/v1/page", params={"model": "small"}).json()
    assert (offered["puzzle"], offered["puzzles"]) == (None, [])
    first = server.client.get("/v1/page").json()
    assert first["model"] == "small"
    assert server.client.get("/v1/page", params={"model": "none"}).status_code == 404


def test_rules_are_those_that_the_model_can_follow(server: Running) -> None:
    offered = server.client.get("/v1/page").json()
    assert offered["default_rule"] is None
    rules = offered["exit_rules"]
    without_head = {kind for kind, rule in EXIT_RULES.items() if not rule.needs_halting}
    assert {rule["kind"] for rule in rules} == without_head
    for rule in rules:
        filled = {f["name"]: 1 if f["default"] is None else f["default"] for f in rule["fields"]}
        made = make_exit_rule(rule["kind"], **filled)
        for field in rule["fields"]:
            assert isinstance(getattr(made, field["name"]), int if field["integer"] else float)
        body = {"model": "small", "prompt": "a", "max_tokens": 1}
        answer = server.post("/v1/completions", exit_rule={"kind": rule["kind"], **filled}, **body)
        assert answer.status_code == 200


def test_the_page_explains_every_rule() -> None:
    block = re.search(r"const RULES = \{(.*?)\};", read("page.js"), re.DOTALL)
    assert block is not None
    assert set(re.findall(r"^  (\w+):", block[1], re.MULTILINE)) == set(EXIT_RULES)


def test_the_page_is_open_and_its_data_needs_the_key() -> None:
    with running(keys=["right"]) as server:
        assert server.client.get("/").status_code == 200
        assert server.client.get("/v1/page").status_code == 401


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(mode: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", read("page.css"), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): ([^;]+);", "".join(blocks[: 1 + (mode == "dark")])))
    paper, ink = channels(colours["paper"]), channels(colours["ink"])
    least = {
        f"{name} on {ground}": contrast(channels(colours[name]), channels(colours[ground]))
        for name in ("ink", "muted", "blue", "good", "bad")
        for ground in ("paper", "band")
    }
    least["button"] = contrast(channels(colours["on-blue"]), channels(colours["blue"]))
    for tenth in range(11):
        strength = 0.06 + (float(colours["tint-most"]) - 0.06) * tenth / 10
        ground = over(colours["tint"], strength, colours["paper"])
        least[f"token {tenth}"] = contrast(ink, ground)
    assert {name: ratio for name, ratio in least.items() if ratio < 4.5} == {}
    # What is no text: the edges of fields, the underline of a token, the bars of a chart.
    shapes = {name: contrast(channels(colours[name]), paper) for name in ("edge", "mark", "bar")}
    assert {name: ratio for name, ratio in shapes.items() if ratio < 3} == {}
