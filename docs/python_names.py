"""The reference of the Python package, read from its sources: nothing of it is imported.

A public name is a function, a class, a constant or a type at the top of a module, or a method of
such a class, and begins with no underscore.
"""

import ast
import html
import re
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "openmythos"
TOP = "openmythos"  # the page of the modules that lie in no folder
ENTRY = re.compile(r"(\*{0,2}[\w.]+): +(.*)", re.DOTALL)
MAX_VALUE = 480  # characters of a constant that are shown
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def parts() -> list[str]:
    """The folders of the package that hold modules, and the page of the others."""
    return [TOP, *sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))]


def modules(part: str) -> list[Path]:
    """The sources of a part, in the order of their names."""
    if part == TOP:
        return sorted(PACKAGE.glob("*.py"))
    return sorted((PACKAGE / part).rglob("*.py"))


def dotted(path: Path) -> str:
    """The name under which a source is imported."""
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def public(node: ast.Module | ast.ClassDef) -> list[Definition]:
    """The public functions and classes of a module, or the public methods of a class."""
    return [
        each
        for each in node.body
        if isinstance(each, Definition)
        and not each.name.startswith("_")
        and not any(
            ast.unparse(mark).endswith(("overload", ".setter")) for mark in each.decorator_list
        )
    ]


def constants(tree: ast.Module) -> dict[str, str]:
    """The public constants and types of a module: what makes each, cut if it is long."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        line = ast.unparse(node).replace("\n", " ")
        line = line if len(line) <= MAX_VALUE else f"{line[:MAX_VALUE]} ..."
        shown = "\n".join(textwrap.wrap(line, 96, subsequent_indent="    "))
        names = (ast.unparse(name) for target in targets for name in _elements(target))
        found |= {name: shown for name in names if name.isidentifier() and name[0] != "_"}
    return found


def _elements(target: ast.expr) -> list[ast.expr]:
    """The names that are set together, as in ``A, B = 1, 2``."""
    return target.elts if isinstance(target, ast.Tuple) else [target]


def part_page(part: str) -> str:
    """The public names of a part of the package, module by module."""
    title = "Modules beside the folders" if part == TOP else f"openmythos.{part}"
    lines = [f"# {title}", ""]
    for path in modules(part):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names, values = public(tree), constants(tree)
        if not names and not values:
            continue
        module = dotted(path)
        lines += [f"## {module} {{#{module}}}", "", prose(ast.get_docstring(tree)), ""]
        if values:
            lines += ["```python", *dict.fromkeys(values.values()), "```", ""]
        for each in names:
            lines += [f"### {each.name} {{#{module}.{each.name}}}", "", *described(each)]
            if isinstance(each, ast.ClassDef):
                for method in public(each):
                    lines += [
                        f"#### {each.name}.{method.name} {{#{module}.{each.name}.{method.name}}}",
                        "",
                    ]
                    lines += described(method)
    return "\n".join(lines)


def described(node: Definition) -> list[str]:
    """What a name is called with, and its docstring."""
    return ["```python", signature(node), "```", "", prose(ast.get_docstring(node)), ""]


def signature(node: Definition) -> str:
    """The line that a name is defined with; of a dataclass also its fields."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        fields = [
            f"    {ast.unparse(line)}"
            for line in node.body
            if isinstance(line, ast.AnnAssign) and not ast.unparse(line.target).startswith("_")
        ]
        marks = [f"@{ast.unparse(mark)}" for mark in node.decorator_list]
        return "\n".join(
            [*marks, f"class {node.name}{f'({bases})' if bases else ''}:", *(fields or ["    ..."])]
        )
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    marks = [
        f"@{mark}"
        for mark in map(ast.unparse, node.decorator_list)
        if mark in {"property", "classmethod", "staticmethod"}
    ]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{word} {node.name}({ast.unparse(node.args)}){returns}: ..."
    return "\n".join([*marks, *textwrap.wrap(line, 96, subsequent_indent="    ")])


def prose(docstring: str | None) -> str:
    """A docstring in Google's form as Markdown."""
    blocks = re.split(r"\n\s*\n", docstring or "")
    return "\n\n".join(_block(block) for block in blocks)


def _block(block: str) -> str:
    title, _, rest = block.partition("\n")
    if not re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", title):
        if all(line.startswith("    ") for line in block.splitlines()):
            return block  # a formula
        return escaped(block)
    entries = [
        " ".join(entry.split()) for entry in re.split(r"\n(?= {4}\S)", f"\n{rest}") if entry.strip()
    ]
    rows = [
        f"- `{match[1]}`: {escaped(match[2])}"
        if (match := ENTRY.fullmatch(entry))
        else f"- {escaped(entry)}"
        for entry in entries
    ]
    return "\n".join([f"**{title.rstrip(':')}**", "", *rows])


def escaped(text: str) -> str:
    """Prose in which only backticks mean something to Markdown."""
    pieces = re.split(r"(`+[^`]+`+)", text)
    return "".join(
        piece if index % 2 else re.sub(r"([\\*_\[\]#|])", r"\\\1", html.escape(piece, quote=False))
        for index, piece in enumerate(pieces)
    )


def public_names_page() -> str:
    """The names that ``import openmythos`` gives, and the pages of all others."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    homes = next(
        ast.literal_eval(line.value)
        for line in tree.body
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "_HOME"
    )
    lines = [
        "# Python",
        "",
        "What `import openmythos as om` gives:",
        "",
        "| name | what |",
        "|---|---|",
    ]
    for name, module in sorted(homes.items()):
        page, place, node = _home(module, name)
        first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        lines.append(f"| [`om.{name}`](python/{page}.md#{place}) | {escaped(first)} |")
    lines += ["", "Every public function, class, method, constant and type, by folder:", ""]
    lines += [
        f"- [{'modules in no folder' if part == TOP else part}](python/{part}.md)"
        for part in parts()
    ]
    return "\n".join([*lines, ""])


def _home(module: str, name: str) -> tuple[str, str, Definition]:
    """The page, the anchor and the definition of a name, also where a package passes it on."""
    inside = module.split(".")[1:]
    path = PACKAGE.joinpath(*inside)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            page = inside[0] if (PACKAGE / inside[0]).is_dir() else TOP
            return page, f"{module}.{name}", node
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _home(str(node.module), name)
    raise ValueError(f"{module} does not define {name}")
