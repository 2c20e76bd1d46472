"""The rules of CONTRIBUTING.md that a machine can hold.

Each rule is a function from a folder to a list of complaints, so that the second half of this file
can show, on a small bad example, that the rule is able to fail.
"""

import ast
import graphlib
import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checked import Loader

ROOT = Path(__file__).parent.parent
PACKAGE = "openmythos"
CODE_FOLDERS = (PACKAGE, "benchmarks", "experiments")

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_CONTRIBUTING_LINES = 150
MAX_CLOSURE_LINES = 3600  # exclusive; of model/ and ops/
THE_LOOP = f"{PACKAGE}/model/loop.py"
MODE_SWITCH = f"{PACKAGE}/model/inference.py"
FOREIGN_CODE = f"{PACKAGE}/interop/hf/"  # what an export carries
# Writers besides openmythos/folder.py, and why what they write need not appear at once.
OTHER_WRITERS = {
    "openmythos/checkpoint/save.py:_sort_metadata": "in a file that is not in its place yet",
    "benchmarks/int8.py:memory_of": "resets the peak that the system counts; no file",
    "openmythos/analysis/picture.py:save": "draws into a whole_file",
    "openmythos/analysis/picture.py:to_svg": "draws into memory",
    "experiments/own_process.py:_redirect": "a log, read as far as it was written",
    "openmythos/data/prepare.py:_Spool.__init__": "a scratch file, never put in place",
}
WRITING_CALLS = {
    *("write_text", "write_bytes", "savefig", "rename", "renames", "mkstemp"),
    "NamedTemporaryFile",
}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
HEAVY_IMPORTS = ("torch", "transformers", "fastapi", "matplotlib")

# Written in two pieces, so that no pattern matches this file.
UNFINISHED = re.compile(
    r"\b(?:"
    + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"))
    + r")\b"
    r"|pragma:\s*no\s*" + "cover"
)
MACHINE_PATH = re.compile(
    r"(?<![\w.:/@~}-])/(?:"
    + "|".join(("home", "root", "Users", "work", "workspace", "mnt", "opt", "srv"))
    + r")/[\w.]|\b[A-Z]:\\Users\\"
)
REGISTRY_HOST = re.compile(
    "index" + r"[-_]url|find" + r"[-_]links|pypi\.org/" + r"simple|python" + r"hosted\.org"
)
PAGE = re.compile(r"(?:docs|experiments|openmythos/zoo)/.*\.md|[A-Z]+\.md|tests/(?!golden/).*\.md")

Rule = Callable[[Path], list[str]]


# --- reading the tree ----------------------------------------------------------------------------


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def package_files(root: Path) -> list[Path]:
    return python_files(root / PACKAGE)


def committed_files(root: Path) -> list[Path]:
    """What git tracks or would track; everything but caches where the folder is no checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode == 0 and (root / ".git").exists():
        return [path for name in found.stdout.split("\0") if (path := root / name).is_file()]
    skipped = re.compile(r"^(\.venv|runs|build|dist|\.git|\.\w+_cache|\.hypothesis|.*__pycache__)$")
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(skipped.match(part) for part in path.relative_to(root).parts)
    ]


def text_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []  # weights and pictures


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


# --- structure -----------------------------------------------------------------------------------


def long_modules(root: Path) -> list[str]:
    sizes = [(path, len(text_lines(path))) for path in package_files(root)]
    return [
        f"{path.relative_to(root)} has {lines} lines; at most {MAX_MODULE_LINES} are allowed"
        for path, lines in sizes
        if lines > MAX_MODULE_LINES
    ]


def long_functions(root: Path) -> list[str]:
    complaints = []
    for path in package_files(root):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    complaints.append(
                        f"{path.relative_to(root)}:{node.lineno} {node.name}() has {lines} lines; "
                        f"at most {MAX_FUNCTION_LINES} are allowed"
                    )
    return complaints


def vague_modules(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}: {part!r} says nothing; name the thing that the module holds"
        for path in package_files(root)
        for part in path.relative_to(root).with_suffix("").parts
        if part in VAGUE_NAMES
    ]


def folders_without_init(root: Path) -> list[str]:
    folders = {path.parent for path in package_files(root)}
    return [
        f"{folder.relative_to(root)}/ has no __init__.py, so import-linter does not see it"
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists()
    ]


def unmirrored_modules(root: Path) -> list[str]:
    complaints = []
    for path in package_files(root):
        if path.name in {"__init__.py", "__main__.py"}:
            continue
        inside = path.relative_to(root / PACKAGE)
        mirror = root / "tests" / inside.parent / f"test_{inside.name}"
        if not mirror.exists():
            complaints.append(f"{path.relative_to(root)} has no {mirror.relative_to(root)}")
        elif not re.search(
            r"^\s*(?:async )?def test_", mirror.read_text(encoding="utf-8"), re.MULTILINE
        ):
            complaints.append(f"{mirror.relative_to(root)} holds no test")
    return complaints


def undocumented_names(root: Path) -> list[str]:
    complaints = []
    for path in package_files(root):
        for node in parsed(path).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            overload = any(ast.unparse(mark).endswith("overload") for mark in node.decorator_list)
            if not node.name.startswith("_") and not overload and not ast.get_docstring(node):
                complaints.append(
                    f"{path.relative_to(root)}:{node.lineno} {node.name} has no docstring"
                )
    return complaints


def _seam_of_members(root: Path) -> dict[str, str]:
    """The seam, by its file, of each config class that carries a ``kind``."""
    return {
        node.name: path.stem
        for path in python_files(root / PACKAGE / "config")
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
        and any(
            isinstance(line, ast.AnnAssign) and line.value and ast.unparse(line.target) == "kind"
            for line in node.body
        )
    }


def member_ladders(root: Path) -> list[str]:
    """``isinstance`` on members of a seam: none in config/ and model/, elsewhere one per seam.

    A member says what is asked of it. Only what translates a format (interop/) knows them all.
    """
    seam_of, complaints = _seam_of_members(root), []
    for path in package_files(root):
        inside = path.relative_to(root / PACKAGE)
        asked: dict[str, set[str]] = {}
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                words = re.findall(r"\w+", ast.unparse(node.args[1]))
                for member in seam_of.keys() & set(words):
                    asked.setdefault(seam_of[member], set()).add(member)
        most = {"config": 0, "model": 0, "interop": len(seam_of)}.get(inside.parts[0], 1)
        complaints += [
            f"{path.relative_to(root)} asks for {', '.join(sorted(members))}; ask the member"
            for members in asked.values()
            if len(members) > most
        ]
    return complaints


def long_contributing(root: Path) -> list[str]:
    lines = len(text_lines(root / "CONTRIBUTING.md"))
    if lines > MAX_CONTRIBUTING_LINES:
        return [f"CONTRIBUTING.md has {lines} lines; at most {MAX_CONTRIBUTING_LINES} are allowed"]
    return []


def _switches_mode(node: ast.AST, returned: list[ast.expr | None]) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "training" and isinstance(node.ctx, ast.Store)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    has_arguments = bool(node.args or node.keywords)
    if node.func.attr == "train":  # of a model: train(was_training), train(mode=False)
        said = [ast.unparse(word) for word in (*node.args, *node.keywords)]
        return len(said) == 1 and any(
            word in said[0] for word in ("training", "mode", "True", "False")
        )
    is_new = isinstance(node.func.value, ast.Call) or node in returned
    return node.func.attr == "eval" and not has_arguments and not is_new


def mode_switches(root: Path) -> list[str]:
    """Evaluation mode set by hand, outside the one context manager that also restores it.

    Not a switch: ``model.train()`` where training begins, and the initial mode of a new model,
    which is set on the call that makes it or by ``return model.eval()``.
    """
    complaints = []
    for path in (file for folder in CODE_FOLDERS for file in python_files(root / folder)):
        inside = path.relative_to(root).as_posix()
        if inside == MODE_SWITCH or inside.startswith(FOREIGN_CODE):
            continue
        nodes = list(ast.walk(parsed(path)))
        returned = [node.value for node in nodes if isinstance(node, ast.Return)]
        complaints += [
            f"{inside}:{node.lineno} sets the mode of a model: {ast.unparse(node)}; use inference()"
            for node in nodes
            if _switches_mode(node, returned)
        ]
    return complaints


def other_loops(root: Path) -> list[str]:
    """Calls of a model's ``step`` outside the one loop, openmythos/model/loop.py."""
    complaints = []
    for path in (file for folder in CODE_FOLDERS for file in python_files(root / folder)):
        inside = path.relative_to(root).as_posix()
        if inside == THE_LOOP or inside.startswith(FOREIGN_CODE):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr == "step" and re.search(r"\bmodel$", owner):
                    call = ast.unparse(node)[:60]
                    complaints.append(f"{inside}:{node.lineno} {call}: only model/loop.py loops")
    return complaints


def other_writers(root: Path) -> list[str]:
    """Files written, or renamed, elsewhere than in openmythos/folder.py."""
    complaints = []
    for folder in (PACKAGE, "benchmarks", "experiments"):
        for path in python_files(root / folder):
            inside = str(path.relative_to(root))
            if inside == f"{PACKAGE}/folder.py":
                continue
            complaints += [
                f"{inside}:{call.lineno} {ast.unparse(call)[:60]}: only openmythos/folder.py writes"
                for owner, call in _calls(parsed(path))
                if _writes(call) and f"{inside}:{owner}" not in OTHER_WRITERS
            ]
    return complaints


def _calls(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the dotted name of the function or class that it stands in."""
    for child in ast.iter_child_nodes(node):
        inside = owner
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{owner}.{child.name}".removeprefix(".")
        if isinstance(child, ast.Call):
            yield owner, child
        yield from _calls(child, inside)


def _writes(call: ast.Call) -> bool:
    """Whether a call writes or renames a file, by its name and its arguments."""
    whole = ast.unparse(call.func)
    name = whole.rpartition(".")[2]
    if name == "open":  # open(path, mode), path.open(mode)
        words = call.args[1:2] if whole == "open" else call.args[:1]
        words += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
        modes = [str(word.value) for word in words if isinstance(word, ast.Constant)]
        return any(set(mode) & set("wax+") for mode in modes)
    if name == "replace":  # of a string and of a dataclass take more than one argument
        return whole == "os.replace" or (len(call.args) == 1 and not call.keywords)
    return name in WRITING_CALLS


# --- words ---------------------------------------------------------------------------------------


def _matching_lines(root: Path, files: list[Path], pattern: re.Pattern[str], why: str) -> list[str]:
    return [
        f"{path.relative_to(root)}:{number} {why}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(text_lines(path), start=1)
        if pattern.search(line)
    ]


def unfinished_code(root: Path) -> list[str]:
    code = [
        path
        for path in committed_files(root)
        if path.suffix in {".py", ".sh", ".toml"} or path.name in {"Makefile", "run"}
    ]
    return _matching_lines(root, code, UNFINISHED, "is unfinished or hides from the tests")


def machine_paths(root: Path) -> list[str]:
    return _matching_lines(root, committed_files(root), MACHINE_PATH, "names a path of one machine")


def registry_hosts(root: Path) -> list[str]:
    return _matching_lines(root, committed_files(root), REGISTRY_HOST, "names a package registry")


def version_copies(root: Path) -> list[str]:
    """The package states the version, pyproject.toml reads it there, the citation agrees."""
    stated = re.compile(r"^__version__ = \"([^\"]+)\"$", re.MULTILINE)
    found = {path: stated.findall(path.read_text(encoding="utf-8")) for path in package_files(root)}
    versions = found.pop(root / PACKAGE / "__init__.py", [])
    if len(versions) != 1:
        return [f"{PACKAGE}/__init__.py states {len(versions)} versions; it must state one"]
    complaints = [
        f"{path.relative_to(root)} states the version again" for path in found if found[path]
    ]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if "version" in project or "version" not in project.get("dynamic", []):
        complaints.append("pyproject.toml states a version; it must be dynamic")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    if f"\nversion: {versions[0]}\n" not in citation:
        complaints.append(f"CITATION.cff does not say 'version: {versions[0]}' as the package does")
    changes = root / "CHANGELOG.md"
    if changes.exists() and f"\n## [{versions[0]}] - " not in changes.read_text(encoding="utf-8"):
        complaints.append(f"CHANGELOG.md has no '## [{versions[0]}] - DATE'")
    return complaints


def pages_without_place(root: Path) -> list[str]:
    """Pages for readers that the navigation of the site does not name."""
    settings = root / "zensical.toml"
    text = settings.read_text(encoding="utf-8") if settings.exists() else ""
    named = set(re.findall(r'= "([^"]+\.md)"', text))
    names = [path.relative_to(root).as_posix() for path in committed_files(root)]
    return [
        f"{name} has no place in nav of zensical.toml"
        for name in names
        if PAGE.fullmatch(name) and name not in named
    ]


# --- the reading closure -------------------------------------------------------------------------


def _imported_names(path: Path, root: Path) -> Iterator[str]:
    """Dotted names that a file imports: at the top, in functions, for type checkers, by string."""
    package_parts = path.relative_to(root).parent.parts
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package_parts[: len(package_parts) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _project_file(name: str, root: Path) -> Path | None:
    """The file that holds ``name``: the module itself, or the module that it is an attribute of.

    The ``__init__.py`` files passed on the way down are not counted: nobody reads them for this.
    """
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in range(len(parts), 0, -1):
        place = root.joinpath(*parts[:end])
        for candidate in (place.with_suffix(".py"), place / "__init__.py"):
            if candidate.exists():
                return candidate
    return None


def reading_closure(start: Path, root: Path) -> list[Path]:
    seen, waiting = {start}, [start]
    while waiting:
        for name in _imported_names(waiting.pop(), root):
            found = _project_file(name, root)
            if found is not None and found not in seen:
                seen.add(found)
                waiting.append(found)
    return sorted(seen)


def large_closure(root: Path) -> list[str]:
    lines = {
        str(inside): len(text_lines(root / PACKAGE / inside))
        for path in reading_closure(root / PACKAGE / "model" / "recurrent.py", root)
        if (inside := path.relative_to(root / PACKAGE)).parts[0] in {"model", "ops"}
    }
    if sum(lines.values()) < MAX_CLOSURE_LINES:
        return []
    return [
        f"reading model/recurrent.py takes {sum(lines.values())} lines of model/ and ops/; fewer "
        f"than {MAX_CLOSURE_LINES} are allowed: {lines}"
    ]


def import_circles(root: Path) -> list[str]:
    """The first circle of modules that import each other, in functions and for types too."""
    graph = {
        path: {_project_file(name, root) for name in _imported_names(path, root)} - {None, path}
        for path in package_files(root)
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(str(path.relative_to(root)) for path in error.args[1])]
    return []


# --- the rules on this repository ----------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        long_modules,
        long_functions,
        vague_modules,
        folders_without_init,
        unmirrored_modules,
        undocumented_names,
        mode_switches,
        import_circles,
        other_writers,
        other_loops,
        member_ladders,
        long_contributing,
        unfinished_code,
        machine_paths,
        registry_hosts,
        version_copies,
        pages_without_place,
    ],
    ids=lambda rule: rule.__name__,
)
def test_repository_has_no(rule: Rule) -> None:
    complaints = rule(ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


def test_rules_see_the_repository() -> None:
    assert package_files(ROOT), "no package to check"
    assert ROOT / "pyproject.toml" in committed_files(ROOT)
    assert len(_seam_of_members(ROOT)) > 20


def test_shapes_are_checked_in_tests() -> None:
    loader = importlib.import_module("openmythos").__spec__.loader
    assert isinstance(loader, Loader), "openmythos was imported before the hook"


@pytest.mark.parametrize("place", OTHER_WRITERS)
def test_other_writers_still_write(place: str) -> None:
    file, owner = place.split(":")
    assert any(name == owner and _writes(call) for name, call in _calls(parsed(ROOT / file)))


def test_golden_folders_are_complete(golden_dir: Callable[[str], Path]) -> None:
    for name in ("openmythos-gqa", "openmythos-mla"):
        files = {path.name for path in golden_dir(name).iterdir()}
        assert files == {"config.json", "io.safetensors", "model.safetensors"}


def test_reading_closure_of_the_model_is_small() -> None:
    if not (ROOT / PACKAGE / "model" / "recurrent.py").exists():
        pytest.skip("openmythos/model/recurrent.py does not exist")
    complaints = large_closure(ROOT)
    assert not complaints, "\n".join(complaints)


def loaded_by_help(root: Path) -> set[str]:
    """The heavy libraries in ``sys.modules`` after ``openmythos --help`` in a fresh interpreter."""
    program = (
        "import json, sys\n"
        "sys.argv = ['openmythos', '--help']\n"
        "from openmythos.cli import main\n"
        "code = 0\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code or 0\n"
        f"loaded = [name for name in {HEAVY_IMPORTS!r} if name in sys.modules]\n"
        "print('\\n' + json.dumps([code, loaded]))\n"
    )
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    code, loaded = json.loads(ran.stdout.strip().splitlines()[-1])
    assert code == 0, f"openmythos --help exits with {code}: {ran.stdout}{ran.stderr}"
    return set(loaded)


def test_help_loads_no_heavy_library() -> None:
    if not (ROOT / PACKAGE / "cli.py").exists():
        pytest.skip("openmythos/cli.py does not exist")
    loaded = loaded_by_help(ROOT)
    assert not loaded, (
        f"`openmythos --help` imports {sorted(loaded)}; import them inside the command"
    )


# --- the rules on small examples: each of them can fail ------------------------------------------


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def function_of(lines: int) -> str:
    return "def f():\n" + "    pass\n" * (lines - 1)


GOOD_AND_BAD = [
    (long_modules, "openmythos/a.py", "x = 1\n" * 600, "x = 1\n" * 601),
    (long_functions, "openmythos/a.py", function_of(80), function_of(81)),
    (long_functions, "openmythos/a.py", "async " + function_of(80), "async " + function_of(81)),
    (undocumented_names, "openmythos/a.py", 'def f():\n    """Say."""\n', "def f():\n    pass\n"),
    (undocumented_names, "openmythos/a.py", "class _A:\n    pass\n", "class A:\n    pass\n"),
    (mode_switches, "openmythos/a.py", "with inference(m):\n    m(x)\n", "m.eval()\nm(x)\n"),
    (mode_switches, "benchmarks/a.py", "m.train()\n", "m.train(was_training)\n"),
    (mode_switches, "benchmarks/a.py", "run.train(display)\n", "m.train(False)\n"),
    (mode_switches, "experiments/a.py", "m = Foreign(c).eval()\n", "y = m.eval()(x)\n"),
    (mode_switches, "openmythos/a.py", "def f():\n    return m.eval()\n", "m.training = False\n"),
    (other_loops, "openmythos/a.py", "optimizer.step()\n", "h = model.step(h, e, i, ctx)\n"),
    (other_loops, "benchmarks/a.py", "advance(model, state, ctx)\n", "run.model.step(h)\n"),
    (other_writers, "openmythos/a.py", "a.replace('b', 'c'); open('a')\n", "a.replace(b)\n"),
    (other_writers, "openmythos/a.py", "replace(config, seed=1)\n", "os.replace(a, b)\n"),
    (other_writers, "benchmarks/a.py", "file.open('rb')\n", "file.open('wb')\n"),
    (other_writers, "experiments/a.py", "write_whole(a, b)\n", "a.write_text(b)\n"),
    (other_writers, "openmythos/a.py", "to_svg(figure)\n", "figure.savefig(path)\n"),
    (long_contributing, "CONTRIBUTING.md", "x\n" * 150, "x\n" * 151),
    (unfinished_code, "openmythos/a.py", "x = 1  # done\n", "x = 1  # TO" + "DO: more\n"),
    (unfinished_code, "Makefile", "all:\n", "all: # FIX" + "ME\n"),
    (unfinished_code, "openmythos/a.py", "raise ValueError\n", "raise NotImplemented" + "Error\n"),
    (unfinished_code, "openmythos/a.py", "x = 1\n", "x = 1  # pragma: no" + " cover\n"),
    (machine_paths, "docs/a.md", "see https://x.org/home/y and docs/root/a\n", "/" + "home/me/x\n"),
    (machine_paths, "a.toml", 'path = "runs/x"\n', 'path = "/' + 'root/x"\n'),
    (registry_hosts, "constraints/cpu.txt", "torch==2.13.0\n", "--extra-index" + "-url x\n"),
]


@pytest.mark.parametrize(("rule", "name", "good", "bad"), GOOD_AND_BAD)
def test_rule_tells_good_from_bad(
    tmp_path: Path, rule: Rule, name: str, good: str, bad: str
) -> None:
    write(tmp_path, name, good)
    assert rule(tmp_path) == []
    write(tmp_path, name, bad)
    (complaint,) = rule(tmp_path)
    assert complaint.startswith(name)


@pytest.mark.parametrize("name", ["model/utils.py", "helpers/loop.py", "base.py"])
def test_vague_modules_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, "openmythos/model/database.py", "")
    assert vague_modules(tmp_path) == []
    write(tmp_path, f"openmythos/{name}", "")
    assert len(vague_modules(tmp_path)) == 1


def test_ladders_over_the_members_of_a_seam_are_named(tmp_path: Path) -> None:
    kinds = "".join(f"class {name}:\n    kind: ClassVar[str] = '{name}'\n" for name in ("A", "B"))
    write(tmp_path, "openmythos/config/injection.py", kinds + "class Member:\n    kind: str\n")
    one, two = "isinstance(x, config.A)\n", "isinstance(x, config.A | B)\n"
    for name, allowed in (("model/a.py", 0), ("train/a.py", 1), ("interop/a.py", 2)):
        for number, text in enumerate(("isinstance(x, Member)\n", one, two)):
            path = write(tmp_path, f"openmythos/{name}", text)
            assert len(member_ladders(tmp_path)) == (number > allowed)
        path.unlink()


def test_folder_without_init_is_named(tmp_path: Path) -> None:
    write(tmp_path, "openmythos/__init__.py", "")
    write(tmp_path, "openmythos/model/block.py", "")
    assert len(folders_without_init(tmp_path)) == 1
    write(tmp_path, "openmythos/model/__init__.py", "")
    assert folders_without_init(tmp_path) == []


def test_unmirrored_module_is_named(tmp_path: Path) -> None:
    write(tmp_path, "openmythos/__init__.py", "")
    write(tmp_path, "openmythos/model/block.py", "")
    assert unmirrored_modules(tmp_path) == [
        "openmythos/model/block.py has no tests/model/test_block.py"
    ]
    write(tmp_path, "tests/model/test_block.py", "x = 1\n")
    assert unmirrored_modules(tmp_path) == ["tests/model/test_block.py holds no test"]
    write(tmp_path, "tests/model/test_block.py", "def test_x():\n    pass\n")
    assert unmirrored_modules(tmp_path) == []


def test_circle_is_named(tmp_path: Path) -> None:
    write(tmp_path, "openmythos/__init__.py", "")
    write(tmp_path, "openmythos/eval/__init__.py", "")
    write(tmp_path, "openmythos/eval/score.py", "import openmythos.eval.task\n")
    write(tmp_path, "openmythos/eval/task.py", "x = 1\n")
    assert import_circles(tmp_path) == []
    types = "if TYPE_CHECKING:\n    from openmythos.eval.score import Score\n"
    write(tmp_path, "openmythos/eval/task.py", types)
    (complaint,) = import_circles(tmp_path)
    assert "openmythos/eval/score.py -> openmythos/eval/task.py" in complaint


def test_version_is_written_once(tmp_path: Path) -> None:
    write(tmp_path, "pyproject.toml", '[project]\ndynamic = ["version"]\n')
    write(tmp_path, "CITATION.cff", "title: x\nversion: 0.2.0\n")
    write(tmp_path, "openmythos/__init__.py", '__version__ = "0.2.0"\n')
    assert version_copies(tmp_path) == []
    write(tmp_path, "pyproject.toml", '[project]\nversion = "0.2.0"\n')
    write(tmp_path, "CITATION.cff", "title: x\nversion: 0.1.0\n")
    write(tmp_path, "openmythos/cli.py", '__version__ = "0.2.0"\n')
    write(tmp_path, "CHANGELOG.md", "# Changes\n\n## [Unreleased]\n")
    assert len(version_copies(tmp_path)) == 4
    write(tmp_path, "openmythos/__init__.py", "")
    assert len(version_copies(tmp_path)) == 1


def test_page_without_place_is_named(tmp_path: Path) -> None:
    write(tmp_path, "zensical.toml", 'nav = [{ "A" = [{ "B" = "docs/b.md" }] }]\n')
    write(tmp_path, "docs/b.md", "")
    write(tmp_path, "tests/golden/notes.md", "")
    assert pages_without_place(tmp_path) == []
    write(tmp_path, "docs/b/c.md", "")
    assert pages_without_place(tmp_path) == ["docs/b/c.md has no place in nav of zensical.toml"]


def test_ignored_files_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, ".venv/lib/a.py", "x = '/" + "home/me/x'\n")
    write(tmp_path, "a.bin", "").write_bytes(b"\xff\xfe/" + b"home/me/x")
    assert machine_paths(tmp_path) == []


def test_closure_follows_every_kind_of_import(tmp_path: Path) -> None:
    start = write(
        tmp_path,
        "openmythos/model/recurrent.py",
        "import math\n"
        "from typing import TYPE_CHECKING\n"
        "import openmythos.config\n"
        "from openmythos.ops import attention\n"
        "from . import norm\n"
        "from .rope import Rope\n"
        "if TYPE_CHECKING:\n    from openmythos.config.counts import Count\n"
        "def f():\n    from openmythos.model.cache import Cache\n"
        "def g():\n    importlib.import_module('openmythos.model.init')\n",
    )
    write(tmp_path, "openmythos/__init__.py", "from openmythos.unread import x\n")
    write(tmp_path, "openmythos/model/__init__.py", "")
    write(tmp_path, "openmythos/ops/__init__.py", "")
    reached = [
        "config/__init__",
        "config/counts",
        "config/schema",
        "model/cache",
        "model/init",
        "model/norm",
        "model/rope",
    ]
    for name in [*reached, "ops/attention", "ops/unread", "unread"]:
        write(tmp_path, f"openmythos/{name}.py", "x = 1\n")
    write(tmp_path, "openmythos/config/__init__.py", "from openmythos.config import schema\n")

    files = {str(path.relative_to(tmp_path / PACKAGE)) for path in reading_closure(start, tmp_path)}
    assert files == {f"{name}.py" for name in [*reached, "ops/attention", "model/recurrent"]}


def test_closure_counts_a_package_whose_names_are_imported(tmp_path: Path) -> None:
    start = write(tmp_path, "openmythos/model/recurrent.py", "from openmythos.ops import attend\n")
    write(tmp_path, "openmythos/ops/__init__.py", "from openmythos.ops.attention import attend\n")
    write(tmp_path, "openmythos/ops/attention.py", "def attend(): ...\n")
    assert len(reading_closure(start, tmp_path)) == 3


@pytest.mark.parametrize(
    ("folder", "lines", "complaints"), [("ops", 700, 0), ("ops", 720, 1), ("config", 720, 0)]
)
def test_large_closure_is_named(tmp_path: Path, folder: str, lines: int, complaints: int) -> None:
    imports = "".join(f"import openmythos.{folder}.m{index}\n" for index in range(5))
    write(tmp_path, "openmythos/model/recurrent.py", imports)
    for index in range(5):
        write(tmp_path, f"openmythos/{folder}/m{index}.py", "x = 1\n" * lines)
    assert len(large_closure(tmp_path)) == complaints


def test_heavy_import_in_help_is_seen(tmp_path: Path) -> None:
    write(tmp_path, "openmythos/__init__.py", "")
    write(tmp_path, "openmythos/cli.py", "def main():\n    print('usage')\n")
    assert loaded_by_help(tmp_path) == set()
    write(
        tmp_path, "openmythos/cli.py", "import matplotlib\ndef main():\n    raise SystemExit(0)\n"
    )
    assert loaded_by_help(tmp_path) == {"matplotlib"}
