"""The demo's report: one self-contained page, its two pictures and all numbers beside it."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from rich.text import Text

from openmythos.analysis import picture as style
from openmythos.demo import picture
from openmythos.demo.result import DemoResults, HopsResult, Sample, TextResult
from openmythos.demo.takeaway import Takeaway, halting_takeaway, takeaways, trace_takeaway
from openmythos.folder import write_json, write_whole

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


def write_report(results: DemoResults, folder: Path) -> Path:
    """Write ``report.html``, ``depth_curve.png``, ``hops_grid.png`` and ``results.json``.

    The numbers are written first: they survive a missing matplotlib.

    Returns:
        The page.

    Raises:
        ValueError: matplotlib is not installed.
    """
    said = {act: [vars(item) for item in found] for act, found in takeaways(results).items()}
    record = {**results.to_dict(), "takeaways": said}
    write_json(folder / "results.json", record)
    picture.plot_depth_curve(results.text, folder / "depth_curve.png")
    picture.plot_hops_grid(results.hops, folder / "hops_grid.png", results.original_halting)
    page = folder / "report.html"
    write_whole(page, render_page(results))
    return page


def render_page(results: DemoResults) -> str:
    """The page as HTML; it refers to nothing outside itself."""
    template = resources.files("openmythos.demo").joinpath("page.html")
    text, hops = results.text, results.hops
    return Template(template.read_text(encoding="utf-8")).substitute(
        version=escape(results.version),
        total_time=_duration(results.total_seconds),
        command=escape(results.command),
        machine=escape(results.machine),
        takeaways="\n".join(
            f"<h3>{act}</h3>\n{_takeaway_list(found)}" for act, found in takeaways(results).items()
        ),
        depth_sampling=escape(text.depth_sampling),
        text_facts=_text_facts(text),
        text_exit_rule=escape(text.exit_rule),
        legend=_legend(text.max_loops),
        samples="\n".join(render_html(sample, text.max_loops) for sample in text.samples),
        max_train_hops=hops.max_train_hops,
        hops_facts=_hops_facts(hops),
        chance=f"{hops.chance:.2f}",
        leak_table=_leak_table(hops),
        **_figures(results),
    )


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


def _legend(max_loops: int) -> str:
    swatches = "".join(
        f'<span class="t" style="--strength:{loop_strength(n, max_loops):.2f}">{n}</span>'
        for n in _scale(max_loops)
    )
    return f'<div class="legend"><span>loops taken:&nbsp;</span>{swatches}</div>'


# --- pictures ------------------------------------------------------------------------------------


def _figures(results: DemoResults) -> dict[str, str]:
    text, hops, original = results.text, results.hops, results.original_halting
    held_out = ", ".join(f"{v:.3f} at {n}" for n, v in sorted(text.validation.items()))
    stage = f"reached {hops.stage_curve[-1][1]} hops" if hops.stage_curve else "not recorded"
    return {
        "depth_figure": _figure(
            style.to_svg(picture.depth_curve(text)),
            "depth",
            f"Line chart of held-out bits per byte by loops: {held_out}.",
            "On a line the weights are the same at every point; only the number of loops differs. "
            "The axis does not begin at zero.",
        ),
        "training_figure": _figure(
            style.to_svg(picture.training_curve(text)),
            "training",
            f"Line chart: training bits per byte over {text.seconds:.0f} seconds, and held-out.",
            "Line: training text, smoothed, at the depths drawn. Diamonds: held-out text.",
        ),
        "text_trace_figure": _figure(
            style.to_svg(style.trace_curves(text.trace)),
            "text-trace",
            _trace_alt(text),
            trace_takeaway(text.trace).text,
        ),
        "hops_figure": _grids(hops, original),
        "stage_figure": _figure(
            style.to_svg(picture.stage_curve(hops, original)),
            "stage",
            f"Step chart: the longest walks in training over {hops.steps} steps, {stage}.",
            "The next length is added when the current one is learnt.",
        ),
        "hops_trace_figure": _figure(
            style.to_svg(style.trace_curves(hops.trace)),
            "hops-trace",
            _trace_alt(hops),
            trace_takeaway(hops.trace).text,
        ),
    }


def _figure(svg: str, name: str, alt: str, caption: str, kind: str = "fits") -> str:
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


def _grid_figure(result: HopsResult, name: str) -> str:
    best = [(hops, *result.best(hops)) for hops in result.hops]
    alt = f"Heat map of accuracy by hops and loops, {result.name}. Best by hops: " + "; ".join(
        f"{hops} hops {value:.2f} at {loops} loops" for hops, loops, value in best
    )
    caption = (
        f"The stronger the blue, the better. Orange, {result.decider} ({result.exit_rule}): the "
        "mean loops that it takes, and the accuracy with them."
    )
    return _figure(style.to_svg(picture.hops_grid(result)), name, f"{alt}.", caption, kind="wide")


def _grids(result: HopsResult, original: HopsResult | None) -> str:
    """The grid, and beside it the same model with the original's halting."""
    if original is None:
        return _grid_figure(result, "grid") + _grid_table(result)
    pair = _grid_figure(result, "grid") + _grid_figure(original, "original-grid")
    said = escape(halting_takeaway(result, original).text)
    tables = _grid_table(result) + _grid_table(original)
    return f'<div class="pair">{pair}</div>\n<p>{said}</p>\n{tables}'


def _trace_alt(result: TextResult | HopsResult) -> str:
    trace = result.trace
    return (
        f"Four line charts over {trace.num_loops} loops. State norm from {trace.state_norm[0]:.1f} "
        f"to {trace.state_norm[-1]:.1f}; relative step from {trace.relative_step[0]:.3f} to "
        f"{trace.relative_step[-1]:.3f}; token correlation from {trace.token_correlation[0]:.2f} "
        f"to {trace.token_correlation[-1]:.2f}; step ratio beside rho(A)."
    )


# --- blocks of the page --------------------------------------------------------------------------


def _takeaway_list(found: Sequence[Takeaway]) -> str:
    marks = {
        True: '<span class="mark yes" aria-hidden="true">✓</span><span class="unseen">Yes: </span>',
        False: '<span class="mark no" aria-hidden="true">✗</span><span class="unseen">No: </span>',
        None: '<span class="mark" aria-hidden="true">·</span>',
    }
    items = "\n".join(f"<li>{marks[item.holds]}{escape(item.text)}</li>" for item in found)
    return f'<ul class="takeaways">\n{items}\n</ul>'


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _text_facts(text: TextResult) -> str:
    best = min(text.validation, key=lambda n: (text.validation[n], n))
    return _facts(
        {
            f"bits/byte, {best} loops": f"{text.validation[best]:.3f}",
            "parameters": _large(text.num_params),
            "tokens seen": _large(text.tokens_seen),
            "training time": _duration(text.seconds),
        }
    )


def _hops_facts(hops: HopsResult) -> str:
    facts = {"training time": _duration(hops.seconds), "training steps": f"{hops.steps:,}"}
    facts["longest walks learnt"] = (
        f"{hops.stage_curve[-1][1]} hops" if hops.stage_curve else "none"
    )
    rank = hops.rank_correlation
    facts["loops follow hops"] = "none" if rank is None else f"{rank:.2f} (rank)"
    return _facts(facts)


def _grid_table(result: HopsResult) -> str:
    head = ["hops", *(f"{n} loops" for n in result.loops), "loops taken", "accuracy then"]
    rows = (
        [str(hops), *(f"{value:.3f}" for value in row), f"{taken:.2f}", f"{reached:.3f}"]
        for hops, row, taken, reached in zip(
            result.hops, result.accuracy, result.exit_loops, result.exit_accuracy, strict=True
        )
    )
    summary = f"<summary>{escape(result.name)}, as a table</summary>"
    return f"<details>{summary}{_table(head, rows)}</details>"


def _leak_table(result: HopsResult) -> str:
    names = list(dict.fromkeys(name for row in result.leak_baselines.values() for name in row))
    if not names:
        return "<p>Not measured.</p>"
    rows = []
    for hops in result.hops:
        guesses = result.leak_baselines.get(hops, {})
        cells = [f"{guesses[name]:.2f}" if name in guesses else "none" for name in names]
        rows.append([str(hops), f"{result.best(hops)[1]:.2f}", *cells])
    return _table(["hops", "model, best", *names], rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes"


def _large(count: int) -> str:
    for size, unit in ((1_000_000_000, "billion"), (1_000_000, "million")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"
