"""The kit that pages of results are made of: one self-contained page, figures, tables, samples.

A page loads nothing from outside itself and follows the reader's light or dark mode.
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

TERMINAL_FEW, TERMINAL_MANY = (45, 50, 60), (236, 140, 48)  # the page's orange, on a dark ground

PAGE_COLOURS = {
    style.INK: "--ink",
    style.MUTED: "--muted",
    style.GRID: "--grid",
    style.BAND: "--band",
    style.PAPER: "--paper",
    style.BLUE: "--blue",
    style.ORANGE: "--orange",
    style.CELL: "--cell",
    style.ON_CELL: "--on-cell",
}


@dataclass(frozen=True)
class Piece:
    """One generated token as text, and the loops that it took."""

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


def loop_strength(loops: int, max_loops: int) -> float:
    """Place on the colour scale: 0 at one loop, 1 at the limit, equal steps by doublings."""
    if max_loops <= 1:
        return 0.0
    return min(max(math.log2(max(loops, 1)) / math.log2(max_loops), 0.0), 1.0)


def render_sample(sample: Sample, max_loops: int) -> Text:
    """A sample for the terminal: each token on the colour of the loops that it took."""
    text = Text.assemble((printable(sample.prompt), "bold"))
    for piece in sample.pieces:
        strength = loop_strength(piece.loops, max_loops)
        text.append(printable(piece.text), style=_terminal_style(strength))
    return text


def render_scale(max_loops: int) -> Text:
    """The legend of ``render_sample``."""
    text = Text("loops ")
    for loops in _scale(max_loops):
        text.append(f" {loops} ", style=_terminal_style(loop_strength(loops, max_loops)))
    return text


def render_html(sample: Sample, max_loops: int) -> str:
    """A sample for the page."""
    tokens = []
    for piece in sample.pieces:
        strength = loop_strength(piece.loops, max_loops)
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
    """Control characters made visible: generated text must not command a terminal or a page."""
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


def _scale(max_loops: int) -> list[int]:
    """Doublings up to the limit."""
    powers = [2**power for power in range(max_loops.bit_length())]
    return sorted({*powers, max_loops})


def legend(max_loops: int) -> str:
    """The colours of ``render_html``, by loops."""
    swatches = "".join(
        f'<span class="t" style="--strength:{loop_strength(n, max_loops):.2f}">{n}</span>'
        for n in _scale(max_loops)
    )
    return f'<div class="legend"><span>loops taken:&nbsp;</span>{swatches}</div>'


# --- blocks of a page ----------------------------------------------------------------------------


def figure(svg: str, name: str, alt: str, caption: str, kind: str = "fits") -> str:
    """A picture with its caption.

    Args:
        svg: As matplotlib writes it.
        name: Unlike that of any other figure of the page: begins the ids inside the picture.
        alt: What the picture shows, in words.
        caption: Stands below it.
        kind: "fits", or "wide" for a picture that scrolls where it does not fit.
    """
    picture = f'<div class="{kind}">{inline_svg(svg, name, alt)}</div>'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def inline_svg(text: str, name: str, alt: str) -> str:
    """A picture for the page: colours from its CSS, so that they follow dark mode; own ids."""
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
    """A row of named numbers."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="facts">{items}</dl>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of plain text; its first column holds names."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    whole = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{whole}</div>'


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
