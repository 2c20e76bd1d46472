"""The site names pages that exist, its reference every name and command; nothing is built."""

import functools
import importlib
import re
from pathlib import Path

import pytest
import typer

import openmythos
from docs import python_names, site
from openmythos.cli import app
from openmythos.command.config import fields_below
from openmythos.config.fields import FieldDoc
from tests.site_suite.run import address_of
from tests.test_repo_rules import ROOT, parsed

part_page = functools.cache(python_names.part_page)  # parsing takes seconds


def test_the_navigation_names_what_there_is_once() -> None:
    """That it names every page is a rule of the repository."""
    named = site.navigation()
    assert len(named) == len(set(named))
    written = {name for name in named if site.generated(name)}
    assert all((ROOT / name).is_file() for name in named if name not in written)
    assert set(site.python_pages()) <= written
    assert len(written) == len(site.python_pages()) + 3


def test_the_reference_has_every_public_name() -> None:
    """Told apart from the reader of sources: what the modules' own names are when imported."""
    pages = {part: part_page(part) for part in python_names.parts()}
    for part, page in pages.items():
        told = set(re.findall(r"\{#(openmythos[\w.]*)\}", page))
        for path in python_names.modules(part):
            module = python_names.dotted(path)
            names = re.findall(
                r"^(?:async )?(?:def|class) ([A-Za-z]\w*)", path.read_text("utf-8"), re.M
            )
            assert {f"{module}.{name}" for name in names} <= told, module
            section = page.partition(f"## {module} {{#{module}}}\n")[2].partition("\n## ")[0]
            made = r"^([A-Za-z]\w*(?:, [A-Za-z]\w*)*)(?:: [^=\n]+)? = "
            for line in re.findall(made, path.read_text("utf-8"), re.M):
                for name in line.split(", "):
                    assert re.search(rf"^\(?(\w+, )*{name}\b", section, re.M), (module, name)
    files = {path for part in pages for path in python_names.modules(part)}
    package = ROOT / "openmythos"
    assert {path for path in package.rglob("*.py") if parsed(path).body} <= files


def test_the_front_page_of_the_reference_has_the_names_of_the_package() -> None:
    page = python_names.public_names_page()
    for name in openmythos.__all__:
        link = re.search(rf"\[`om\.{name}`\]\(python/(\w+)\.md#([\w.]+)\)", page)
        assert link
        assert f"{{#{link[2]}}}" in part_page(link[1])
        module, _, attribute = link[2].rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(openmythos, name)


def test_the_reference_has_every_command_and_option() -> None:
    page = site.commands_page()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands) > 10
    for name, command in commands.items():
        _, _, section = page.partition(f"\n## {name}\n")
        section = section.partition("\n## ")[0]
        for param in command.params:
            shown = param.metavar or param.opts[0]
            assert param.hidden or f"`{shown}" in section, (name, shown)


def test_the_reference_has_every_field_with_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    page = site.fields_page()
    fields = fields_below(None)
    for field in fields:
        assert f"| `{field.name}` |" in page
        assert field.meaning, field.name
    bar = FieldDoc("model.x", "gqa", "a | b", 1, "One | two * <x>.", {"k": "A member."})
    monkeypatch.setattr("openmythos.command.config.fields_below", lambda part: [bar])
    row = r"| `model.x` | `1` | a \| b | With gqa: One \| two \* &lt;x&gt;. |"
    assert row in site.fields_page()
    assert "| `model.x=k` | | | A member. |" in site.fields_page()


def test_docstrings_become_markdown() -> None:
    text = """Does x_y [T D].

    a = b * c

Args:
    first: One
        line.
    b: `c_d`.

Raises:
    ValueError: No."""
    assert python_names.prose(text).split("\n\n") == [
        r"Does x\_y \[T D\].",
        "    a = b * c",
        "**Args**",
        "- `first`: One line.\n- `b`: `c_d`.",
        "**Raises**",
        "- `ValueError`: No.",
    ]


def test_pages_bring_what_they_link_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, into = tmp_path / "root", tmp_path / "pages"
    for name in ("docs/x.png", "data/a.json", "docs/other.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1")
    page = root / "docs/a.md"
    links = '![x](x.png) [d](../data) [o](other.md#x) [r](reference/fields.md) <img src="x.png">'
    page.write_text(
        f"{links} `[not](one.md)`\n\n```text\n[nor](this.md)\n```\n\n[web](https://a.b)\n"
    )
    monkeypatch.setattr(site, "navigation", lambda: ["docs/a.md"])
    site.put_pages(into, root)
    found = sorted(path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file())
    assert found == ["data/a.json", "data/index.html", "docs/a.md", "docs/x.png"]
    assert 'href="a.json"' in (into / "data/index.html").read_text()
    page.write_text("[gone](gone.json)")
    with pytest.raises(ValueError, match=r"docs/a\.md links to gone\.json"):
        site.put_pages(into, root)


def test_readers_see_what_made_a_figure() -> None:
    page = "<!-- made by: make test -->\n![a](a.png)\n\n<!-- made by: runs/b.png -->\n![b](b.png)\n"
    told = site.told_makers(page)
    assert told.startswith("![a](a.png)\n<small>Made by `make test`.</small>\n")
    assert told.endswith("\n<!-- made by: runs/b.png -->\n![b](b.png)\n")
    image = site.told_makers('<!-- made by: make test -->\n<img src="a.png" alt="a">\n')
    assert image == '<img src="a.png" alt="a">\n\n<small>Made by `make test`.</small>\n'
    table = site.told_makers(
        "<!-- made by: make test -->\n\n| a |\n|---|\n| ![b](b.png) |\n\nText\n"
    )
    end = "| ![b](b.png) |\n\n<small>Made by `make test`.</small>\n\nText\n"
    assert table == f"\n| a |\n|---|\n{end}"


def test_pages_have_addresses() -> None:
    found = [address_of(name) for name in ("README.md", "docs/guide/x.md", "docs/y/README.md")]
    assert found == ["index.html", "docs/guide/x.html", "docs/y/index.html"]


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<script src="assets/a.js"></script><a href="https://a.b">x</a>', []),
        ('<link rel="canonical" href="https://a.b/">', []),
        ('<script src="https://a.b/c.js"></script>', ["https://a.b/c.js"]),
        ('<link rel=stylesheet href="//a.b/font.css">', ["//a.b/font.css"]),
    ],
)
def test_requests_to_other_hosts_are_seen(page: str, found: list[str]) -> None:
    assert site.foreign_requests(page) == found
