"""Builds the site: ``python -m docs.site``, which ``make docs`` runs.

Pages that the navigation in ``zensical.toml`` names are put into ``build/pages`` at their places
in the repository, with what they link to, so that one link serves the site and whoever reads the
files. The lists of the reference are written there from the program. Zensical does the rest.
"""

import html
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from docs.python_names import part_page, parts, public_names_page

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "zensical.toml"
REFERENCE = "docs/reference"
PYTHON_PAGE = re.compile(rf"{REFERENCE}/python/(\w+)\.md")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)|(?:href|src)=\"([^\"]+)\"")
MAKER = re.compile(
    r"^<!-- made by: ((?:openmythos|make|python) .+) -->\n((?:!\[|<img ).*|(?:\n\|.*)+)$",
    re.MULTILINE,
)
CODE = re.compile(r"^(`{3,}).*?^\1\s*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def project() -> dict[str, Any]:
    """The settings of the site."""
    return dict(tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["project"])


def navigation() -> list[str]:
    """The pages that the navigation names, in its order."""
    return list(_leaves(project()["nav"]))


def _leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from _leaves(below)


def generated(page: str) -> Callable[[], str] | None:
    """What writes a page of the reference; None if the page lies in the repository."""
    if match := PYTHON_PAGE.fullmatch(page):
        return lambda: part_page(match[1])
    return {
        f"{REFERENCE}/commands.md": commands_page,
        f"{REFERENCE}/fields.md": fields_page,
        f"{REFERENCE}/python.md": public_names_page,
    }.get(page)


def python_pages() -> list[str]:
    """The pages of the reference that list a part of the package each."""
    return [f"{REFERENCE}/python/{part}.md" for part in parts()]


def commands_page() -> str:
    """Every command with its arguments and options, as its ``--help`` tells them."""
    import typer

    from openmythos.cli import app

    lines = ["# Commands", "", "`openmythos COMMAND --help` tells the same.", ""]
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        context = command.context_class(command, info_name=name)
        told = [param.get_help_record(context) for param in command.params]
        lines += [f"## {name}", "", in_markdown(command.help or ""), ""]
        lines += ["| argument or option | meaning |", "|---|---|"]
        lines += [
            f"| `{cell(words)}` | {in_markdown(cell(said))} |" for words, said in filter(None, told)
        ]
        lines.append("")
    return "\n".join(lines)


def fields_page() -> str:
    """Every field of a run's configuration, as ``openmythos config`` tells them."""
    from openmythos.command.config import fields_below, in_words

    lines = [
        "# Fields of a run",
        "",
        "`openmythos config` tells the same; `train --set NAME=VALUE` sets one.",
        "",
    ]
    part = ""
    for field in fields_below(None):
        if (above := field.name.split(".")[0]) != part:
            part = above
            lines += [
                "",
                f"## {part}",
                "",
                "| field | default | type | meaning |",
                "|---|---|---|---|",
            ]
        owner = f"With {field.kind}: " if field.kind else ""
        default = f"`{cell(in_words(field.default))}`" if field.default != "" else ""
        lines.append(
            f"| `{field.name}` | {default} | {in_markdown(cell(field.type))} "
            f"| {in_markdown(cell(owner + field.meaning))} |"
        )
        lines += [
            f"| `{field.name}={kind}` | | | {in_markdown(cell(meaning))} |"
            for kind, meaning in field.choices.items()
        ]
    return "\n".join([*lines, ""])


def cell(text: str) -> str:
    """Text on one line of a table, whose columns a bar would part."""
    return " ".join(text.split()).replace("|", "\\|")


def in_markdown(text: str) -> str:
    """Text of the program, in which angle brackets and stars mean themselves."""
    return html.escape(text, quote=False).replace("*", "\\*")


def linked(page: Path, root: Path) -> Iterator[str]:
    """The files and folders of the repository that a page links to, by their places in it.

    Raises:
        ValueError: One of them does not exist. The builder looks at links to pages only.
    """
    for match in LINK.finditer(CODE.sub("", page.read_text(encoding="utf-8"))):
        name = unquote((match[1] or match[2]).partition("#")[0])
        if name and not re.match(r"[a-z][a-z0-9+.-]*:", name):
            target = (page.parent / name).resolve()
            if not target.is_relative_to(root) or not target.exists():
                if not generated(os.path.relpath(target, root)):
                    raise ValueError(f"{page.relative_to(root)} links to {name}: no such file")
                continue
            yield target.relative_to(root).as_posix()


def put_pages(into: Path, root: Path = ROOT) -> None:
    """Fill a folder with the pages of the navigation and what they link to besides pages."""
    shutil.rmtree(into, ignore_errors=True)
    names = navigation()
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        if write := generated(name):
            (into / name).write_text(write(), encoding="utf-8")
            continue
        text = (root / name).read_text(encoding="utf-8")
        (into / name).write_text(told_makers(text), encoding="utf-8")
        for target in linked(root / name, root):
            place = into / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (root / target).is_dir():
                place.mkdir(exist_ok=True)
                (place / "index.html").write_text(listing(root / target), encoding="utf-8")
                for file in filter(Path.is_file, (root / target).iterdir()):
                    shutil.copy(file, place / file.name)
            elif place.suffix != ".md":  # pages are there, or the strict build says which is not
                shutil.copy(root / target, place)


def told_makers(page: str) -> str:
    """A page that shows the command which made a figure; in the file it is a comment."""
    return MAKER.sub(_told, page)


def _told(made: re.Match[str]) -> str:
    """A figure and what made it; after a table, or an image in HTML, in a paragraph of its own."""
    apart = "" if made[2].startswith("![") else "\n"
    return f"{made[2]}\n{apart}<small>Made by `{made[1]}`.</small>"


def listing(folder: Path) -> str:
    """A page of links to the files of a folder, for links to folders."""
    rows = [
        f'<li><a href="{file.name}">{file.name}</a></li>'
        for file in sorted(folder.iterdir())
        if file.is_file()
    ]
    title = "/".join(folder.parts[-3:])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<h1>{title}</h1><ul>{''.join(rows)}</ul></html>\n"
    )


def foreign_requests(page: str) -> list[str]:
    """The addresses of other hosts that a browser asks for when it shows a page."""
    tags = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*>", page)
    shown = [tag for tag in tags if not re.search(r"rel=\"?(?:canonical|prev|next)\b", tag)]
    return re.findall(r"(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", "".join(shown))


def main() -> None:
    """Put the pages together, build the site, and refuse one that asks other hosts for anything."""
    pages = ROOT / project()["docs_dir"]
    put_pages(pages)
    for name in (*project()["extra_css"], *project()["extra_javascript"]):
        shutil.copy(ROOT / name, pages / name)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(1)
    for page in sorted((ROOT / project()["site_dir"]).rglob("*.html")):
        if found := foreign_requests(page.read_text(encoding="utf-8")):
            sys.exit(f"error: {page.relative_to(ROOT)} asks for {found[0]}")


if __name__ == "__main__":
    main()
