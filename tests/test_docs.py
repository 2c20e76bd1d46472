"""README and docs: every command, option, target, file and internal link that they name exists."""

import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

from docs.page_code import FENCE, pictures_of
from experiments.board import BEGIN, END
from openmythos.checkpoint.save import save_pretrained
from openmythos.config.schema import from_dict, to_dict
from openmythos.model.exit import EXIT_RULES
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.depth_schedule import DepthConfig
from openmythos.train.objective import ObjectiveConfig
from tests.strategies import SEAMS, random_model, small_config

ROOT = Path(__file__).parent.parent
REPOSITORY_FOLDERS = (
    "openmythos",
    "tests",
    "experiments",
    "benchmarks",
    "docs",
    "examples",
    "constraints",
    ".ci",
)
SCRIPT_SUFFIXES = (".py", ".sh")
MAX_PAGE_WORDS = 1200
MAX_FRONT_LINES = 80

Help = Callable[[tuple[str, ...]], str | None]


# --- reading Markdown ----------------------------------------------------------------------------


def documents(root: Path) -> list[Path]:
    """Pages that describe what is; the changelog describes what was."""
    pages = [root / "README.md", root / "CONTRIBUTING.md"]
    for folder in ("docs", "experiments", "benchmarks"):
        pages += sorted((root / folder).rglob("*.md"))
    return [page for page in pages if page.exists()]


def split_code(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The prose, and the fenced blocks as (language, content)."""
    prose: list[str] = []
    blocks: list[tuple[str, list[str]]] = []
    fence = ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        if fence:
            if mark and mark[2].startswith(fence) and not mark[3]:
                fence = ""
            else:
                blocks[-1][1].append(line)
        elif mark:
            fence = mark[2]
            blocks.append((mark[3], []))
        else:
            prose.append(line)
    return "\n".join(prose), [(language, "\n".join(lines)) for language, lines in blocks]


def bash_commands(text: str) -> list[list[str]]:
    """The simple commands of all blocks marked bash, split into words."""
    commands = []
    for language, content in split_code(text)[1]:
        if language != "bash":
            continue
        for line in content.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            command: list[str] = []
            for word in [*lexer, ";"]:
                if not re.fullmatch(r"[;&|()]+", word):
                    command.append(word)
                elif command:
                    commands.append(command)
                    command = []
    return commands


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a page get on GitHub."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", split_code(text)[0], re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found | set(re.findall(r"<a (?:name|id)=[\"']([^\"']+)", text))


# --- the checks: each gives a list of complaints -------------------------------------------------


def make_targets(root: Path) -> set[str]:
    makefile = root / "Makefile"
    text = makefile.read_text(encoding="utf-8") if makefile.exists() else ""
    return set(re.findall(r"^([A-Za-z][\w-]*)\s*:(?!=)", text, re.MULTILINE))


def openmythos_complaint(words: list[str], help_of: Help) -> str | None:
    path: tuple[str, ...] = ()
    if words and not words[0].startswith("-"):
        path = (words[0],)
    text = help_of(path)
    if text is None:
        return "there is no such subcommand"
    options = [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]
    unknown = [
        option
        for option in options
        if option != "--help" and not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text)
    ]
    return f"unknown option {', '.join(unknown)}" if unknown else None


def file_complaint(words: list[str], root: Path) -> str | None:
    """A script that is run, or a path inside a folder of the repository, must exist."""
    script = words[0] if words[0].startswith("./") else None
    if Path(words[0]).name.startswith(("python", "bash")):
        arguments = [word for word in words[1:] if not word.startswith("-")]
        if "-m" in words:
            module = words[words.index("-m") + 1].replace(".", "/")
            inside = module.split("/")[0] in REPOSITORY_FOLDERS
            there = (root / f"{module}.py").exists() or (root / module / "__main__.py").exists()
            if inside and not there:
                return f"there is no module {module}"
        elif "-c" not in words and arguments:
            script = arguments[0]
    named = [script] if script else []
    named += [
        word
        for word in words
        if word.removeprefix("./").split("/")[0] in REPOSITORY_FOLDERS and "/" in word
    ]
    missing = [name for name in named if not (root / name.split("::")[0]).exists()]
    return f"no such file in the repository: {', '.join(missing)}" if missing else None


def command_complaints(root: Path, help_of: Help) -> list[str]:
    complaints = []
    for page in documents(root):
        for command in bash_commands(page.read_text(encoding="utf-8")):
            if problem := complaint_about(command, root, help_of):
                complaints.append(f"{page.relative_to(root)}: `{shlex.join(command)}`: {problem}")
    return complaints


def complaint_about(command: list[str], root: Path, help_of: Help) -> str | None:
    """What is wrong with a command; None: nothing is known to be."""
    words = list(command)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    if not words:
        return None
    problem = file_complaint(words, root)
    if Path(words[0]).name == "openmythos" or words[1:3] == ["-m", "openmythos"]:
        rest = words[1:] if Path(words[0]).name == "openmythos" else words[3:]
        problem = openmythos_complaint(rest, help_of) or problem
    elif words[0] == "make":
        asked = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        absent = [target for target in asked if target not in make_targets(root)]
        problem = f"no such target: {', '.join(absent)}" if absent else problem
    return problem


def written_by_hand(page: str) -> str:
    """A page without what `openmythos reproduce` writes into it."""
    if page.startswith("# Scoreboard\n"):
        return ""
    return re.sub(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", "", page, flags=re.DOTALL)


def long_page_complaints(root: Path) -> list[str]:
    """Pages of too many words, those of tables included; a number is none, and code is not read."""
    complaints = []
    for page in documents(root):
        prose, _ = split_code(written_by_hand(page.read_text(encoding="utf-8")))
        prose = re.sub(r"\]\([^)]*\)|<[^>]*>", " ", prose)  # addresses
        words = sum(bool(re.search(r"[A-Za-z]", word)) for word in prose.split())
        if words > MAX_PAGE_WORDS:
            complaints.append(
                f"{page.relative_to(root)} has {words} words; at most {MAX_PAGE_WORDS} are allowed"
            )
    return complaints


def figure_complaints(root: Path, help_of: Help) -> list[str]:
    """Figures without what makes them: a command, a page of the guide, or a file of its own."""
    complaints = []
    for page in documents(root):
        for name, made in pictures_of(written_by_hand(page.read_text(encoding="utf-8"))).items():
            words = shlex.split(made)
            if not made:
                problem: str | None = "no comment before it says <!-- made by: COMMAND -->"
            elif words[0] in ("openmythos", "make", "python"):
                problem = complaint_about(words, root, help_of) or nowhere(words, help_of)
            elif made.startswith("docs/guide/"):
                problem = None if (root / made).is_file() else f"no such page: {made}"
            else:  # tests/test_docs_run.py runs the guide and looks for the file
                problem = None if page.parent.name == "guide" else f"no command: {made}"
            if problem:
                complaints.append(f"{page.relative_to(root)}: {name}: {problem}")
    return complaints


def nowhere(words: list[str], help_of: Help) -> str | None:
    """Complain of a command that writes a figure only with an option that it lacks."""
    if words[0] != "openmythos":
        return None
    option = "--scale" if words[1] == "reproduce" else "--out"  # without a scale it only tries out
    needed = option in (help_of((words[1],)) or "") and option not in words
    return f"the command has no {option}, and writes no figure" if needed else None


def link_complaints(root: Path) -> list[str]:
    complaints = []
    for page in [*documents(root), *root.glob("CHANGELOG.md")]:
        prose, _ = split_code(page.read_text(encoding="utf-8"))
        prose = re.sub(r"`[^`\n]*`", "", prose)
        targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)", prose)
        targets += re.findall(r"^\s*\[[^\]]+\]:\s+(\S+)", prose, re.MULTILINE)
        targets += re.findall(r"(?:href|src)=[\"']([^\"']+)", prose)
        for target in targets:
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue  # another site: a test needs no network
            name, _, anchor = unquote(target).partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists():
                complaints.append(f"{page.relative_to(root)}: link to {target}: no such file")
            elif (
                anchor
                and file.suffix == ".md"
                and anchor not in anchors(file.read_text(encoding="utf-8"))
            ):
                complaints.append(f"{page.relative_to(root)}: link to {target}: no such heading")
    return complaints


def mention_complaints(root: Path) -> list[str]:
    """Paths in backticks, such as `openmythos/config.py`; a <placeholder> or a * is left alone."""
    complaints = []
    for page in documents(root):
        for span in re.findall(r"`([^`\n]+)`", split_code(page.read_text(encoding="utf-8"))[0]):
            folder = span.split("/")[0]
            if folder not in REPOSITORY_FOLDERS or not re.fullmatch(r"\.?\w[\w.-]*/[\w./-]*", span):
                continue
            if not (root / span).exists():
                complaints.append(f"{page.relative_to(root)}: `{span}`: no such file")
    return complaints


def seam_complaints(text: str, seams: Mapping[str, Sequence[str]]) -> list[str]:
    """Members that no table has: the first cell names the seam, the second its members."""
    listed: dict[str, set[str]] = {}
    names: list[str] = []
    for row in re.findall(r"^\|(.*)\|$", split_code(text)[0], re.MULTILINE):
        first, second = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[:2])
        names = first or names
        for name in names:
            listed.setdefault(name, set()).update(second)
    missing = [f"there is no row of {seam}" for seam in seams if seam not in listed]
    return missing + [
        f"the rows of {seam} lack `{kind}`"
        for seam, kinds in seams.items()
        for kind in kinds
        if kind not in listed.get(seam, {kind})
    ]


# --- this repository -----------------------------------------------------------------------------


@functools.cache
def real_help(path: tuple[str, ...]) -> str | None:
    """What the command prints with --help, or None where the command does not exist."""
    command = [sys.executable, "-m", "openmythos", *path, "--help"]
    plain = {**os.environ, "COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}
    ran = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    return ran.stdout if ran.returncode == 0 else None


def test_the_front_page_shows_commands() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("README.md does not exist")
    first_words = {
        command[0] for command in bash_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    }
    assert "make" in first_words, "README.md has no ```bash block that runs make"


def test_commands_in_the_docs_exist() -> None:
    complaints = command_complaints(ROOT, real_help)
    assert not complaints, "\n" + "\n".join(complaints)


def test_no_page_is_long() -> None:
    complaints = long_page_complaints(ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


def test_every_figure_names_the_command_that_made_it() -> None:
    complaints = figure_complaints(ROOT, real_help)
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_front_page_is_one_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FRONT_LINES
    assert len(re.findall(r"<img |!\[", text)) == 1
    assert "It has nothing to do with Anthropic" in text
    assert "reconstruction of public hypotheses" in text


def test_links_in_the_docs_resolve() -> None:
    complaints = link_complaints(ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


def test_files_named_in_the_docs_exist() -> None:
    complaints = mention_complaints(ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


def outer_seams() -> dict[str, tuple[str, ...]]:
    unions = {"train.depth.sampling": DepthConfig, "train.objective": ObjectiveConfig}
    kinds = {name: tuple(m.kind for m in typing.get_args(union)) for name, union in unions.items()}
    return {**kinds, "--exit-rule": tuple(EXIT_RULES)}


def test_the_seams_page_lists_every_member() -> None:
    kinds = {
        seam: tuple(part.kind for part in parts if hasattr(part, "kind"))
        for seam, parts in SEAMS.items()
    }
    text = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
    complaints = seam_complaints(text, {**kinds, **outer_seams()})
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_code_from_python_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, names = (ROOT / "docs/from-python.md").read_text(encoding="utf-8"), dict[str, Any]()
    tokenizer = byte_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.vocab_size, max_seq_len=256), seed=0)
    save_pretrained(model, tmp_path / "runs" / "demo" / "text", tokenizer)
    monkeypatch.chdir(tmp_path)
    blocks = [content for language, content in split_code(text)[1] if language == "python"]
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    assert names["out"].logits.shape == (2, 32, names["config"].vocab_size)
    assert [len(row) for row in names["result"].tokens] == [32]
    assert names["cache"].lengths == [32, 32]
    assert names["new"].num_loops == 8


def test_the_models_of_the_seams_page_are_one_class() -> None:
    """Its blocks run in order; each leaves a config, whose model runs and survives JSON."""
    text, names = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8"), dict[str, Any]()
    blocks = [content for language, content in split_code(text)[1] if language == "python"]
    exec(blocks[0], names)
    models = []
    for block in blocks[1:]:
        names.pop("config", None)
        exec(block, names)
        config = names["config"]
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
        model = names["om"].RecurrentDepthLM(config)
        logits = model(torch.arange(6)[None], num_loops=3).logits
        assert logits.shape == (1, 6, 256)
        assert logits.isfinite().all()
        models.append(to_dict(config))
    assert len(models) == 7
    assert all(a != b for a, b in itertools.combinations(models, 2))


# --- small examples: each check can fail ---------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "complaints"),
    [
        ("| `halting`: exits | `act` | of h |\n| | `gate`, `bias=0` | |\n| `rope` | | |\n", []),
        ("| `halting` | `act` | not `gate` |\n| `rope` | | |\n", ["rows of halting lack `gate`"]),
        ("| `halting` | `act` | |\n| | `gate` | |\n", ["there is no row of rope"]),
        ("| `halting` | `act` | |\n| `rope` | `gate` | |\n", ["rows of halting lack `gate`"]),
    ],
)
def test_members_of_a_seam(rows: str, complaints: list[str]) -> None:
    found = seam_complaints(
        f"| seam | member |\n|---|---|\n{rows}", {"halting": ("act", "gate"), "rope": ()}
    )
    assert [text.removeprefix("the ") for text in found] == complaints


def page(root: Path, text: str) -> Path:
    (root / "README.md").write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("word " * 1200, 0),
        ("word " * 1201, 1),
        ("| word |\n" * 1200 + "```text\n" + "word " * 1300 + "\n```\n", 0),
        ("| word |\n" * 1201, 1),
        ("| 1.5 |\n" * 1300, 0),
        (f"{BEGIN}\n" + "word " * 1300 + f"\n{END}\n", 0),
    ],
)
def test_long_pages(tmp_path: Path, text: str, complaints: int) -> None:
    assert len(long_page_complaints(page(tmp_path, text))) == complaints


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("<!-- made by: openmythos train -->\n![a](a.png)\n![b](b.png)\n", 0),
        ("<!-- made by: make test -->\n\n| ![a](a.png) |\n|---|\n| ![b](b.png) |\n", 0),
        (f"{BEGIN}\n![a](a.png)\n{END}\n", 0),
        ("![a](a.png)\n", 1),
        ('<img src="a.png">\n', 1),
        ("<!-- made by: openmythos train -->\nSome words.\n![a](a.png)\n", 1),
        ("<!-- made by: openmythos fly -->\n![a](a.png)\n", 1),
        ("<!-- made by: openmythos eval runs/a -->\n![a](a.png)\n", 1),
        ("<!-- made by: openmythos eval runs/a --out b -->\n![a](a.png)\n", 0),
        ("<!-- made by: make gone -->\n![a](a.png)\n", 1),
        ("<!-- made by: runs/a.png -->\n![a](a.png)\n", 1),
    ],
)
def test_figures(tmp_path: Path, text: str, complaints: int) -> None:
    (tmp_path / "Makefile").write_text("test:\n", encoding="utf-8")
    assert len(figure_complaints(page(tmp_path, text), small_help)) == complaints


def small_help(path: tuple[str, ...]) -> str | None:
    known = {(): "--version", ("train",): "--preset TEXT --num-loops INTEGER", ("eval",): "--out"}
    return known.get(path)


def complain_about(root: Path, command: str) -> list[str]:
    (root / "Makefile").write_text("setup:\n\ntest: setup\nX := 1\n", encoding="utf-8")
    for name in ("tests/test_a.py", "openmythos/__main__.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return command_complaints(page(root, f"# A\n\n```bash\n{command}\n```\n"), small_help)


@pytest.mark.parametrize(
    "command",
    [
        "make test",
        'make -s test ARGS="-k x"  # a comment',
        "openmythos --version",
        "openmythos train --preset tiny \\\n  --num-loops=8",
        "$ OMP_NUM_THREADS=1 .venv/bin/openmythos train | head",
        "python -m openmythos train --preset tiny",
        "python -m pytest tests/test_a.py::test_x",
        "pip install -e . && make setup",
        "cat runs/x/metrics.jsonl",
    ],
)
def test_good_command_passes(tmp_path: Path, command: str) -> None:
    assert complain_about(tmp_path, command) == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make tset", "no such target: tset"),
        ("make X", "no such target: X"),
        ("openmythos fly", "no such subcommand"),
        ("ls && openmythos fly", "no such subcommand"),
        ("python -m openmythos fly", "no such subcommand"),
        ("openmythos train --num-loop 8", "unknown option --num-loop"),
        ("openmythos train --num-loops-x 8", "unknown option --num-loops-x"),
        ("python examples/a.py", "no such file in the repository: examples/a.py"),
        ("pytest tests/test_b.py", "no such file in the repository: tests/test_b.py"),
        ("python -m benchmarks.depth", "no module benchmarks/depth"),
        ("./run.sh", "no such file in the repository: ./run.sh"),
    ],
)
def test_bad_command_is_named(tmp_path: Path, command: str, problem: str) -> None:
    (complaint,) = complain_about(tmp_path, command)
    assert problem in complaint


def test_only_bash_blocks_are_commands() -> None:
    text = "make a\n```text\nmake b\n```\n````bash\nmake c\n````\n```bash\nmake d\n```\n"
    assert bash_commands(text) == [["make", "c"], ["make", "d"]]


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        (
            "[a](LICENSE) [b](#one-two) [c](https://x.org/y) ![d](LICENSE 'x')\n\n# One `two`\n",
            0,
        ),
        ("[a](#twice-1)\n\n# Twice\n\n# Twice\n", 0),
        ("`[a](gone.md)`\n\n```text\n[a](gone.md)\n```\n", 0),
        ("[a](gone.md)\n", 1),
        ("[a](README.md#gone)\n", 1),
        ("[a][b]\n\n[b]: gone.md\n", 1),
        ('<img src="gone.png">\n', 1),
    ],
)
def test_links(tmp_path: Path, text: str, complaints: int) -> None:
    (tmp_path / "LICENSE").touch()
    assert len(link_complaints(page(tmp_path, text))) == complaints


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("`openmythos/config.py` `runs/x` `tests/<path>/test_<name>.py` `docs/*.md` `a/b`\n", 0),
        ("`openmythos/gone.py`\n", 1),
        ("`docs/gone.md`\n", 1),
    ],
)
def test_mentions(tmp_path: Path, text: str, complaints: int) -> None:
    (tmp_path / "openmythos").mkdir()
    (tmp_path / "openmythos" / "config.py").touch()
    assert len(mention_complaints(page(tmp_path, text))) == complaints
