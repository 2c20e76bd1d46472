"""The demo's report: one self-contained page, its two pictures and all numbers beside it."""

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from openmythos.analysis import picture as style
from openmythos.demo import picture
from openmythos.demo.result import DemoResults, HopsResult, TextResult
from openmythos.demo.takeaway import Takeaway, halting_takeaways, takeaways, trace_takeaway
from openmythos.eval.score import with_error
from openmythos.folder import write_json, write_whole
from openmythos.report import page as kit
from openmythos.report.page import LoopScale


def write_report(results: DemoResults, folder: Path) -> Path:
    """Write ``report.html``, ``depth_curve.png``, ``hops_grid.png`` and ``results.json``.

    The numbers are written first, so that they are kept if matplotlib is missing.

    Returns:
        The path of the page.

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
    scale = LoopScale.of(piece.loops for sample in text.samples for piece in sample.pieces)
    body = Template(template.read_text(encoding="utf-8")).substitute(
        version=escape(results.version),
        total_time=kit.duration(results.total_seconds),
        command=escape(results.command),
        machine=escape(results.machine),
        takeaways="\n".join(
            f"<h3>{act}</h3>\n{_takeaway_list(found)}" for act, found in takeaways(results).items()
        ),
        depth_sampling=escape(text.depth_sampling),
        text_facts=_text_facts(text),
        text_exit_rule=escape(text.exit_rule),
        legend=kit.legend(scale),
        samples="\n".join(kit.render_html(sample, scale) for sample in text.samples),
        max_train_hops=hops.max_train_hops,
        hops_facts=_hops_facts(hops),
        chance=f"{hops.chance:.2f}",
        leak_table=_leak_table(hops),
        **_figures(results),
    )
    return kit.page("What loops buy: an OpenMythos demo", body)


# --- pictures ------------------------------------------------------------------------------------


def _figures(results: DemoResults) -> dict[str, str]:
    text, hops, original = results.text, results.hops, results.original_halting
    held_out = ", ".join(f"{v.value:.3f} at {n}" for n, v in sorted(text.validation.items()))
    stage = f"reached {hops.stage_curve[-1][1]} hops" if hops.stage_curve else "not recorded"
    return {
        "depth_figure": kit.figure(
            style.to_svg(picture.depth_curve(text)),
            "depth",
            f"Line chart of held-out bits per byte by loops: {held_out}.",
            "On a line the weights are the same at every point; only the number of loops differs. "
            "Bars: one standard error of the difference to "
            f"{text.trained_depth} loops, document by document; the level itself is known to "
            f"{text.validation[text.trained_depth].stderr or 0.0:.3f}. The axis does not begin at "
            "zero.",
        ),
        "training_figure": kit.figure(
            style.to_svg(picture.training_curve(text)),
            "training",
            f"Line chart: training bits per byte over {text.seconds:.0f} seconds, and held-out.",
            "Line: training text, smoothed, at the depths drawn. Diamonds: held-out text.",
        ),
        "text_trace_figure": kit.figure(
            style.to_svg(style.trace_curves(text.trace)),
            "text-trace",
            _trace_alt(text),
            trace_takeaway(text.trace).text,
        ),
        "hops_figure": _grids(hops, original),
        "stage_figure": kit.figure(
            style.to_svg(picture.stage_curve(hops, original)),
            "stage",
            f"Step chart: the longest walks in training over {hops.steps} steps, {stage}.",
            "The next length is added when the current one is learnt.",
        ),
        "hops_trace_figure": kit.figure(
            style.to_svg(style.trace_curves(hops.trace)),
            "hops-trace",
            _trace_alt(hops),
            trace_takeaway(hops.trace).text,
        ),
    }


def _grid_figure(result: HopsResult, name: str) -> str:
    best = [(hops, *result.best(hops)) for hops in result.hops]
    alt = f"Heat map of accuracy by hops and loops, {result.name}. Best by hops: " + "; ".join(
        f"{hops} hops {score.value:.2f} at {loops} loops" for hops, loops, score in best
    )
    caption = (
        f"The stronger the blue, the better. Orange, {result.decider} ({result.exit_rule}): the "
        "mean loops that it takes, and the accuracy with them. One standard error of an accuracy "
        f"is at most {_largest_error(result):.3f} ({result.num_walks} walks per row)."
    )
    return kit.figure(
        style.to_svg(picture.hops_grid(result)), name, f"{alt}.", caption, kind="wide"
    )


def _largest_error(result: HopsResult) -> float:
    return max(result.at(hops, n).stderr or 0.0 for hops in result.hops for n in result.loops)


def _grids(result: HopsResult, original: HopsResult | None) -> str:
    """The grid, and beside it the same model with the original's halting."""
    if original is None:
        return _grid_figure(result, "grid") + _grid_table(result)
    pair = _grid_figure(result, "grid") + _grid_figure(original, "original-grid")
    said = escape(" ".join(item.text for item in halting_takeaways(result, original)))
    tables = _grid_table(result) + _grid_table(original)
    return f'<div class="pair">{pair}</div>\n<p>{said}</p>\n{tables}'


def _trace_alt(result: TextResult | HopsResult) -> str:
    trace = result.trace
    return (
        f"Six line charts over {trace.num_loops} loops. State norm from {trace.state_norm[0]:.1f} "
        f"to {trace.state_norm[-1]:.1f}; relative step from {trace.relative_step[0]:.3f} to "
        f"{trace.relative_step[-1]:.3f}; token correlation from {trace.token_correlation[0]:.2f} "
        f"to {trace.token_correlation[-1]:.2f}; step ratio beside rho(A); turn; radial part."
    )


# --- lists and tables --------------------------------------------------------------------------


def _takeaway_list(found: Sequence[Takeaway]) -> str:
    marks = {
        True: '<span class="mark yes" aria-hidden="true">✓</span><span class="unseen">Yes: </span>',
        False: '<span class="mark no" aria-hidden="true">✗</span><span class="unseen">No: </span>',
        None: '<span class="mark" aria-hidden="true">·</span>',
    }
    items = "\n".join(f"<li>{marks[item.holds]}{escape(item.text)}</li>" for item in found)
    return f'<ul class="takeaways">\n{items}\n</ul>'


def _text_facts(text: TextResult) -> str:
    return kit.facts(
        {
            f"bits/byte, {text.best} loops": with_error(text.validation[text.best]),
            "parameters": kit.large_count(text.num_params),
            "tokens seen": kit.large_count(text.tokens_seen),
            "training time": kit.duration(text.seconds),
        }
    )


def _hops_facts(hops: HopsResult) -> str:
    facts = {"training time": kit.duration(hops.seconds), "training steps": f"{hops.steps:,}"}
    facts["longest walks learnt"] = (
        f"{hops.stage_curve[-1][1]} hops" if hops.stage_curve else "none"
    )
    rank = hops.rank_correlation
    facts["loops follow hops"] = "none" if rank is None else f"{rank:.2f} (rank)"
    return kit.facts(facts)


def _grid_table(result: HopsResult) -> str:
    head = ["hops", *(f"{n} loops" for n in result.loops), "loops taken", "accuracy then"]
    rows = []
    for hops, row in zip(result.hops, result.accuracy, strict=True):
        taken, reached = result.of_decider(hops)
        cells = [with_error(taken, 2), with_error(reached)]
        rows.append([str(hops), *(f"{value:.3f}" for value in row), *cells])
    summary = f"<summary>{escape(result.name)}, as a table</summary>"
    return f"<details>{summary}{kit.table(head, rows)}</details>"


def _leak_table(result: HopsResult) -> str:
    names = list(dict.fromkeys(name for row in result.leak_baselines.values() for name in row))
    if not names:
        return "<p>Not measured.</p>"
    rows = []
    for hops in result.hops:
        guesses = result.leak_baselines.get(hops, {})
        cells = [f"{guesses[name]:.2f}" if name in guesses else "none" for name in names]
        rows.append([str(hops), with_error(result.best(hops)[1], 2), *cells])
    return kit.table(["hops", "model, best", *names], rows)
