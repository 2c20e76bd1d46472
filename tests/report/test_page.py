import re
from collections.abc import Sequence

import pytest

from openmythos.analysis import picture as style
from openmythos.report import page as kit
from openmythos.report.page import (
    LoopScale,
    Piece,
    Sample,
    printable,
    render_html,
    render_sample,
    render_scale,
)
from tests.demo.examples import loop_trace
from tests.report.parser import Page

SAMPLE = Sample("go <on>", [Piece(" a & b", 1), Piece("\x1b[2J", 16)])
SCALE = LoopScale(1, 16)


def test_blocks_make_a_well_formed_page() -> None:
    svg = style.to_svg(style.trace_curves(loop_trace()))
    body = "\n".join(
        [
            kit.figure(svg, "one", "The state, by <loops>.", "See & learn."),
            kit.figure(svg, "two", "The same.", "Again.", kind="wide"),
            kit.facts({"loops <most>": "4"}),
            kit.table(["name", "<value>"], [["a", "1"], ["b & c", "2"]]),
            kit.legend(SCALE),
            render_html(SAMPLE, SCALE),
            render_html(Sample("alone", []), LoopScale.of([])),
        ]
    )
    text = kit.page("Loops & more", body)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and "<title>Loops &amp; more</title>" in text
    assert page.labels == ["The state, by <loops>.", "The same."]
    assert len(page.ids) == len(set(page.ids))  # though the pictures are equal
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    said = " ".join(page.words)
    for words in ("See & learn.", "loops <most>", "<value>", "b & c", "go <on>", "2 tokens, 8.5 "):
        assert words in said
    assert "nothing generated" in said
    assert "var(--blue)" in text and "#1f5fa8" not in text.split("</style>", 1)[1]


def test_numbers_in_words() -> None:
    assert [kit.duration(seconds) for seconds in (90.4, 150.0)] == ["90 seconds", "2.5 minutes"]
    counts = (900_000, 2_259_520, 3 * 10**9)
    assert [kit.large_count(n) for n in counts] == ["900,000", "2.26 million", "3.00 billion"]


def test_colour_scale_goes_by_doublings() -> None:
    assert [SCALE.strength(n) for n in (1, 2, 4, 8, 16, 99)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert LoopScale(3, 3).strength(3) == LoopScale.of([]).strength(3) == 0


def test_colour_scale_spans_the_loops_that_occur() -> None:
    scale = LoopScale.of([4, 3, 5, 3])
    assert (scale.fewest, scale.most) == (3, 5)
    assert (scale.strength(3), scale.strength(5)) == (0, 1) and 0.5 < scale.strength(4) < 0.6
    assert scale.marks() == [3, 4, 5]
    assert LoopScale(3, 20).marks() == [3, 4, 8, 16, 20]


def channels(colour: str) -> Sequence[float]:
    """Red, green and blue of ``#1f2733``, or of the page's ``240 140 50``."""
    if colour.startswith("#"):
        return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return [float(part) for part in colour.split()]


def over(colour: str, strength: float, paper: str) -> Sequence[float]:
    """A colour of this opacity, on paper."""
    pairs = zip(channels(colour), channels(paper), strict=True)
    return [strength * above + (1 - strength) * below for above, below in pairs]


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
    """The contrast ratio of WCAG 2.2, from 1 to 21."""

    def luminance(colour: Sequence[float]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(mode: str) -> None:
    css = kit.page("", "")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): ([^;]+);", "".join(blocks[: 1 + (mode == "dark")])))
    least = {}
    for name in ("ink", "muted", "blue", "orange", "good", "bad"):
        for ground in ("paper", "band"):
            pair = channels(colours[name]), channels(colours[ground])
            least[f"{name} on {ground}"] = contrast(*pair)
    for tenth in range(11):
        strength = 0.06 + (float(colours["tint-most"]) - 0.06) * tenth / 10
        ground = over(colours["tint"], strength, colours["paper"])
        least[f"token {tenth}"] = contrast(channels(colours["ink"]), ground)
        ground = over(colours["cell"], 0.04 + 0.092 * tenth, colours["paper"])
        least[f"cell {tenth}"] = contrast(channels(colours["ink"]), ground)
    assert {name: ratio for name, ratio in least.items() if ratio < 4.5} == {}


def test_pictures_have_the_colours_of_the_light_page() -> None:
    css = kit.page("", "")
    for colour, variable in kit.PAGE_COLOURS.items():
        assert f"{variable}: {colour};" in css


def test_sample_for_the_terminal() -> None:
    text = render_sample(Sample("go", [Piece(" on", 1), Piece(" \x1b[2J", 16)]), SCALE)
    assert text.plain == "go on \N{SYMBOL FOR ESCAPE}[2J"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["go"] == "bold"
    assert styles[" on"].endswith("on #2d323c")
    assert styles[" \N{SYMBOL FOR ESCAPE}[2J"].endswith("on #ec8c30")
    assert render_scale(LoopScale(1, 12)).plain.split() == ["loops", "1", "2", "4", "8", "12"]


def test_control_and_direction_characters_are_made_visible() -> None:
    assert printable("a\n\tb") == "a\n\tb"
    assert (
        printable("\x00\x7f\u202e\ud800") == "\N{SYMBOL FOR NULL}" + "\N{REPLACEMENT CHARACTER}" * 3
    )
