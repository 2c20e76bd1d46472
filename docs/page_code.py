"""The commands and code of a page, in order: what the tests and ``docs.run_guide`` run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDE = tuple(sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs/guide").glob("*.md")))

FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*([\w-]*).*$")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
SAVED = re.compile(r"saved as `([^`]+)`:$")
PICTURE = re.compile(r"!\[[^\]]*\]\((\S+\.png)\)|<img src=\"([^\"]+\.png)\"")
MADE_BY = re.compile(r"<!-- made by: (.+) -->")


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


def pictures_of(page: str) -> dict[str, str]:
    """The pictures of a page, each with what makes it; empty where the page does not say.

    It stands in a comment before the picture, or before the table that holds it:
    ``<!-- made by: python -m docs.concept_figures -->``. In the guide it is the file that the
    page's own commands make.
    """
    found: dict[str, str] = {}
    made = ""
    for line in page.splitlines():
        names = [a or b for a, b in PICTURE.findall(line)]
        if told := MADE_BY.fullmatch(line.strip()):
            made = told[1]
        elif line.strip() and not names and not line.startswith("|"):
            made = ""
        found |= dict.fromkeys(names, made)
    return found
