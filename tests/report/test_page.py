from openmythos.analysis import picture as style
from openmythos.report import page as kit
from openmythos.report.page import (
    Piece,
    Sample,
    loop_strength,
    printable,
    render_html,
    render_sample,
    render_scale,
)
from tests.demo.examples import loop_trace
from tests.report.parser import Page

SAMPLE = Sample("go <on>", [Piece(" a & b", 1), Piece("\x1b[2J", 16)])


def test_blocks_make_a_well_formed_page() -> None:
    svg = style.to_svg(style.trace_curves(loop_trace()))
    body = "\n".join(
        [
            kit.figure(svg, "one", "The state, by <loops>.", "See & learn."),
            kit.figure(svg, "two", "The same.", "Again.", kind="wide"),
            kit.facts({"loops <most>": "4"}),
            kit.table(["name", "<value>"], [["a", "1"], ["b & c", "2"]]),
            kit.legend(16),
            render_html(SAMPLE, 16),
            render_html(Sample("alone", []), 16),
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
    assert [loop_strength(n, 16) for n in (1, 2, 4, 8, 16, 99)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert loop_strength(3, 1) == 0


def test_sample_for_the_terminal() -> None:
    text = render_sample(Sample("go", [Piece(" on", 1), Piece(" \x1b[2J", 16)]), 16)
    assert text.plain == "go on \N{SYMBOL FOR ESCAPE}[2J"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["go"] == "bold"
    assert styles[" on"].endswith("on #2d323c")
    assert styles[" \N{SYMBOL FOR ESCAPE}[2J"].endswith("on #ec8c30")
    assert render_scale(12).plain.split() == ["loops", "1", "2", "4", "8", "12"]


def test_control_and_direction_characters_are_made_visible() -> None:
    assert printable("a\n\tb") == "a\n\tb"
    assert (
        printable("\x00\x7f\u202e\ud800") == "\N{SYMBOL FOR NULL}" + "\N{REPLACEMENT CHARACTER}" * 3
    )
