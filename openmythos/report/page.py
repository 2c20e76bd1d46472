"""Building blocks of pages of results: the page, figures, tables, samples.

A page is one self-contained HTML file and follows the reader's light or dark mode.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

from rich.text import Text

from openmythos.analysis import picture as style

MOST_MARKS = 8  # in the legend of a scale
TERMINAL_FEW, TERMINAL_MANY = (45, 50, 60), (236, 140, 48)  # RGB, for a dark terminal

PAGE_COLOURS = {
    style.INK: "--ink",
    style.MUTED: "--muted",
    style.GRID: "--grid",
    style.BAND: "--band",
    style.PAPER: "--paper",
    style.BLUE: "--blue",
    style.ORANGE: "--orange",
    style.CELL: "--cell",
}


@dataclass(frozen=True)
class Piece:
    """One generated token: its text and the loops that it took."""

    text: str
    loops: int


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    prompt: str
    pieces: Sequence[Piece]


def page(title: str, body: str) -> str:
    """A whole page as HTML, from its title in plain text and the HTML of its body."""
    template = resources.files("openmythos.report").joinpath("page.html")
    skeleton = Template(template.read_text(encoding="utf-8"))
    return skeleton.substitute(title=escape(title), body=body)


# --- coloured text -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoopScale:
    """The colours of tokens by loops: from the fewest to the most that occur, by doublings."""

    fewest: int
    most: int

    @classmethod
    def of(cls, loops: Iterable[int]) -> "LoopScale":
        """The scale of these numbers of loops."""
        found = sorted({*loops}) or [1]
        return cls(found[0], found[-1])

    def strength(self, loops: int) -> float:
        """Position on the scale: 0 at the fewest loops, 1 at the most, logarithmic between."""
        if self.most <= self.fewest:
            return 0.0
        passed = math.log(max(loops, 1) / self.fewest) / math.log(self.most / self.fewest)
        return min(max(passed, 0.0), 1.0)

    def marks(self) -> list[int]:
        """The numbers of loops in a legend: all if few, else powers of two and both ends."""
        whole = range(self.fewest, self.most + 1)
        powers = {2**power for power in range(self.most.bit_length())}
        return [
            n
            for n in whole
            if len(whole) <= MOST_MARKS or n in powers or n in (whole[0], whole[-1])
        ]


def render_sample(sample: Sample, scale: LoopScale) -> Text:
    """A sample for the terminal; each token's background shows the loops that it took."""
    text = Text.assemble((printable(sample.prompt), "bold"))
    for piece in sample.pieces:
        style = _terminal_style(scale.strength(piece.loops))
        text.append(printable(piece.text), style=style)
    return text


def render_scale(scale: LoopScale) -> Text:
    """The colour legend of ``render_sample``."""
    text = Text("loops ")
    for loops in scale.marks():
        text.append(f" {loops} ", style=_terminal_style(scale.strength(loops)))
    return text


def render_html(sample: Sample, scale: LoopScale) -> str:
    """A sample as HTML."""
    tokens = []
    for piece in sample.pieces:
        strength = scale.strength(piece.loops)
        title = f"{piece.loops} loop{'' if piece.loops == 1 else 's'}"
        tokens.append(
            f'<span class="t" style="--strength:{strength:.2f}" title="{title}">'
            f"{escape(printable(piece.text))}</span>"
        )
    counts = [piece.loops for piece in sample.pieces]
    said = "nothing generated"
    if counts:
        mean = sum(counts) / len(counts)
        said = f"{len(counts)} tokens, {mean:.1f} loops on average, {min(counts)} to {max(counts)}"
    return (
        f'<div class="sample"><blockquote><span class="prompt">{escape(printable(sample.prompt))}'
        f'</span>{"".join(tokens)}</blockquote><p class="quiet">{said}</p></div>'
    )


def printable(text: str) -> str:
    """Make control characters visible, so that generated text cannot control a terminal."""
    shown = []
    for character in text:
        code = ord(character)
        if character not in "\n\t" and unicodedata.category(character) in {"Cc", "Cf", "Cs"}:
            character = chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"
        shown.append(character)
    return "".join(shown)


def _terminal_style(strength: float) -> str:
    mixed = [
        round(few + (many - few) * strength)
        for few, many in zip(TERMINAL_FEW, TERMINAL_MANY, strict=True)
    ]
    ink = "#f4f5f7" if strength < 0.62 else "#1a1206"
    return f"{ink} on #{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"


def legend(scale: LoopScale) -> str:
    """The colour legend of ``render_html``."""
    swatches = "".join(
        f'<span class="t" style="--strength:{scale.strength(n):.2f}">{n}</span>'
        for n in scale.marks()
    )
    return f'<div class="legend"><span>loops taken:&nbsp;</span>{swatches}</div>'


# --- blocks of a page ----------------------------------------------------------------------------


def figure(svg: str, name: str, alt: str, caption: str, kind: str = "fits") -> str:
    """A picture with its caption.

    Args:
        svg: SVG text as matplotlib writes it.
        name: A name that is unique on the page; prefix of the ids inside the picture.
        alt: What the picture shows, in words.
        caption: Text below the picture.
        kind: "fits", or "wide" for a picture that scrolls sideways on a narrow screen.
    """
    scrolls = ' tabindex="0"' if kind == "wide" else ""  # by keyboard, too
    picture = f'<div class="{kind}"{scrolls}>{inline_svg(svg, name, alt)}</div>'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def inline_svg(text: str, name: str, alt: str) -> str:
    """SVG for the page: colours come from the page's CSS (dark mode), ids begin with ``name``."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in PAGE_COLOURS.items():
        text = text.replace(f": {colour}", f": var({variable})")
    opening = f'<svg role="img" aria-label="{escape(alt)}"'
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', lambda _: opening, text, count=1)


def facts(values: Mapping[str, str]) -> str:
    """A row of numbers with their names."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="facts">{items}</dl>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of plain text; the first column holds names."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    whole = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table" tabindex="0">{whole}</div>'


def duration(seconds: float) -> str:
    """Seconds in words: 90 seconds, 2.5 minutes."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes"


def large_count(count: int) -> str:
    """A count in words: 2.26 million."""
    for size, unit in ((1_000_000_000, "billion"), (1_000_000, "million")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"
