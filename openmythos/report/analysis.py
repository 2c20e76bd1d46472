"""An analysis as one self-contained page: the reading map first, what decides nothing last."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from openmythos.analysis import picture
from openmythos.analysis.block_state import BlockStates
from openmythos.analysis.example import CONTROL
from openmythos.analysis.expert import ExpertOverlap
from openmythos.analysis.lens import ANSWER, CHOICE, LensRanks
from openmythos.analysis.novelty import Novelty
from openmythos.analysis.reading import ReadingMap
from openmythos.analysis.record import Analysis, Interventions
from openmythos.analysis.trace import LoopTrace
from openmythos.folder import write_whole
from openmythos.report import page as kit

Interval = tuple[float, float]
UNDEFINED = "none"
WAY = "on the way"
SLIGHT = 0.1  # bits
MOST_LISTED = 24  # loops that a table lists one by one


def write_analysis_page(found: Analysis, path: Path) -> None:
    """Write the page.

    Raises:
        ValueError: matplotlib is not installed.
    """
    picture.require_matplotlib()
    write_whole(path, render_analysis(found))


def render_analysis(found: Analysis) -> str:
    """The page as HTML; it refers to nothing outside itself but the record beside it."""
    parts = [
        "<header>",
        '<p class="eyebrow">OpenMythos: what each loop does</p>',
        f"<h1>{escape(found.model)}</h1>",
        f'<p class="lead">{escape(headline(found))}</p>',
        kit.facts(_facts(found)),
        "</header>",
        "<main>",
        *_maps(found),
        *_differences(found),
        *_depth(found),
        *_descriptions(found),
        *_settings(found),
        "</main>",
    ]
    return kit.page(f"{found.model}: what each loop does", "\n".join(parts) + "\n")


def headline(found: Analysis) -> str:
    """The answer in two sentences."""
    first, total = found.at[0], found.at[0].num_loops
    gap = first.difference
    if total == 1:
        return "One loop is enough for these examples, so there are no two loops to compare."
    said = f"{_loops(total)} are enough, and {gap.num_working} of them read something."
    if gap.mean_bits is None or gap.null is None or gap.mean_interval is None:
        return f"{said} No two neighbours do, so there is nothing to compare."
    numbers = f"{gap.mean_bits:.2f} bits ({_span(gap.mean_interval)})"
    if gap.mean_interval[0] > gap.null[1]:
        how = "different tokens" if gap.mean_bits >= SLIGHT else "slightly different tokens"
        return f"{said} Neighbours read {how}: {numbers}, where 1 is nothing in common."
    if gap.mean_interval[1] < 0.05:
        return f"{said} Neighbours read the same tokens: {numbers}."
    null = f"{gap.null[1]:.2f}"
    return (
        f"{said} These examples show no difference between neighbours: {numbers}, and loops in any "
        f"order differ by up to {null}."
    )


def _facts(found: Analysis) -> dict[str, str]:
    depth, enough = found.depth, found.at[0].num_loops
    layers = "/".join(map(str, found.facts["layers"]))
    return {
        "examples": f"{found.settings['num_rows']:,} {found.examples}",
        "loops that are enough (T*)": str(enough),
        "the model's own loops (T)": str(depth.trained),
        f"accuracy at {enough}": f"{depth.accuracy[enough - 1]:.3f}",
        "parameters": kit.large_count(found.facts["parameters"]),
        "layers: prelude/core/coda": layers,
    }


# --- what changing loops shows --------------------------------------------------------------------


def _maps(found: Analysis) -> list[str]:
    parts = [
        "<section>",
        "<h2>What each loop reads</h2>",
        "<p>One column of tokens is corrupted during one loop, and everything else is clean. A "
        "cell of the first picture is the share of the effect on the answer that this loop has "
        "alone: 1 is all of it. In the second picture the column is clean in this loop only, and 1 "
        "means that this is enough.</p>",
    ]
    for number, each in enumerate(found.at):
        if number == 0:
            said = f"At {_loops(each.num_loops)}, the fewest that are enough (T*)"
        else:
            said = f"At {_loops(each.num_loops)}, the model's own (T): " + (
                "surplus loops can repair what one has lost"
                if each.num_loops > found.at[0].num_loops
                else "fewer than it needs here"
            )
        parts += [f"<h3>{escape(said)}</h3>", _map_pair(each.reading, f"map-{number}")]
    return [*parts, "</section>"]


def _map_pair(reading: ReadingMap, name: str) -> str:
    record = reading.to_dict()
    columns, label = short_columns(reading.columns)
    rows = [str(loop + 1) for loop in range(reading.num_loops)]
    figures = []
    for kind, title in (
        ("necessity", "Needed at this loop"),
        ("sufficiency", "Enough at this loop"),
    ):
        values = record[kind]
        chart = picture.heat_map(
            values, rows, columns, title=title, row_label="loop", column_label=label
        )
        most = [_strongest(row, reading.columns) for row in values]
        listed = "; ".join(
            f"loop {loop} most {said}" for loop, said in zip(rows, most, strict=True)
        )
        alt = f"Heat map, {title.lower()}, by loop and column of tokens: {listed}."
        caption = (
            "Each row is a loop, each column what was corrupted. A dot: corrupting this column "
            "does not clearly move the answer."
            if kind == "necessity"
            else "Where the two pictures agree, the loop does it alone."
        )
        kind_of = "wide" if len(columns) > 9 else "fits"
        figures.append(kit.figure(picture.to_svg(chart), f"{name}-{kind}", alt, caption, kind_of))
    head = ["column", *(f"loop {row}" for row in rows), "sum"]
    table = [
        [
            column,
            *(
                _with_interval(record["necessity"][loop][k], record["necessity_interval"][loop][k])
                for loop in range(len(rows))
            ),
            _number(record["necessity_sum"][k]),
        ]
        for k, column in enumerate(reading.columns)
    ]
    said = f"Needed, as a table with 95 % intervals; accuracy {reading.accuracy:.3f}"
    return (
        f'<div class="pair">{"".join(figures)}</div>'
        f"<details><summary>{said}</summary>{kit.table(head, table)}</details>"
    )


def short_columns(columns: Sequence[str]) -> tuple[list[str], str]:
    """The columns' names without the word that they share, and a label that says it."""
    words = {name.split(" ")[0] for name in columns if " " in name}
    if len(words) == 1:
        (word,) = words
        before = [f"the {name}, then " for name in columns if " " not in name]
        short = [name.removeprefix(f"{word} ") for name in columns]
        return short, f"{''.join(before)}each {word}"
    of_text = columns[0][0].isdigit()  # distances
    return [*columns], "tokens before the last one" if of_text else "each word before the last one"


def _strongest(row: Sequence[float | None], columns: Sequence[str]) -> str:
    known = [(value, name) for value, name in zip(row, columns, strict=True) if value is not None]
    value, name = max(known, default=(0.0, ""))
    return f"{name} ({value:.2f})" if value >= 0.05 else "nothing"


def _differences(found: Analysis) -> list[str]:
    parts = [
        "<section>",
        "<h2>Does a loop differ from the one before?</h2>",
        "<p>Reading: bits between the rows of two neighbours in the map, over loops whose row sums "
        "to more than 0.05; 0 is the same reading, 1 nothing in common. Novelty: what is lost when "
        "a loop's update is replaced by what the update before predicts of it (by a factor, or a "
        "linear map), as a share of what the loop brings; it is undefined where the loop brings "
        "nothing. Operator: how far the step changes, on the same states, if the next loop's map "
        "runs instead; exactly 0 if no signal tells the loops apart.</p>",
    ]
    for each in found.at:
        gap = each.difference
        parts.append(f"<h3>At {_loops(each.num_loops)}</h3>")
        if each.num_loops > 1:
            parts.append(_difference_table(each))
        mean = "undefined" if gap.mean_bits is None else f"{gap.mean_bits:.3f} bits"
        said = [
            f"{gap.num_working} of {_loops(each.num_loops)} read something "
            f"({_span(gap.num_working_interval, 0)}). Mean between neighbours: {mean} "
            f"({_span(gap.mean_interval)}); with the loops of each example shuffled: "
            f"{_span(gap.null)}."
        ]
        if each.num_loops > 1 and not any(each.operators.neighbours):
            said.append("The map is exactly the same at every loop: nothing tells the loops apart.")
        said += [f"{name.capitalize()} was left out: {why}." for name, why in each.left_out.items()]
        parts.append(f"<p>{escape(' '.join(said))}</p>")
    return [*parts, "</section>"]


def _difference_table(each: Interventions) -> str:
    gap, new = each.difference, each.novelty
    rows = []
    for loop in range(min(each.num_loops - 1, MOST_LISTED)):
        rows.append(
            [
                f"{loop + 1} and {loop + 2}",
                _with_interval(gap.bits[loop], gap.bits_interval[loop]),
                *_novelty_cells(new, loop),
                f"{each.operators.neighbours[loop]:.3f}",
            ]
        )
    head = ["loops", "reading, bits", "novelty over a factor", "over a linear map", "operator"]
    return kit.table(head, rows)


def _novelty_cells(new: Novelty | None, loop: int) -> list[str]:
    if new is None:
        return [UNDEFINED, UNDEFINED]
    return [
        _with_interval(new.scalar_novelty[loop], new.scalar_interval[loop]),
        _with_interval(new.ridge_novelty[loop], new.ridge_interval[loop]),
    ]


def _depth(found: Analysis) -> list[str]:
    depth = found.depth
    values = depth.log_prob if depth.of_text else depth.accuracy
    what = "log-probability of the right token" if depth.of_text else "accuracy"
    unit = ", in nats" if depth.of_text else ""
    rule = "within one per cent" if depth.of_text else "within one point"
    chart = picture.curves_by_loop(
        {"": values}, title=f"{what.capitalize()} by loops{unit}", marks=marks_of(found)
    )
    listed = ", ".join(f"{value:.3f} at {n}" for n, value in enumerate(values, 1))
    alt = f"Line chart, {what} by loops: {listed}."
    caption = (
        f"Orange: T*, the fewest loops {rule} of the best, and T, the model's own. "
        "Surplus loops hide what a loop does, so everything above is measured at T*."
        + (" The axis does not begin at zero." if depth.of_text else "")
    )
    rows = [
        [str(n), f"{accuracy:.3f}", f"{nats:.3f}"]
        for n, (accuracy, nats) in enumerate(zip(depth.accuracy, depth.log_prob, strict=True), 1)
    ]
    table = kit.table(["loops", "accuracy", "log-probability, nats"], rows)
    return [
        "<section>",
        "<h2>How many loops are enough?</h2>",
        kit.figure(picture.to_svg(chart), "depth", alt, caption),
        f"<details><summary>As a table</summary>{table}</details>",
        "</section>",
    ]


def marks_of(found: Analysis) -> dict[str, int]:
    """T* and T, as pictures mark them."""
    enough, own = found.depth.fewest, found.depth.trained
    return {"T* and T": own} if enough == own else {"T*": enough, "T": own}


# --- what decides nothing -------------------------------------------------------------------------


def _descriptions(found: Analysis) -> list[str]:
    parts = [
        "<section>",
        "<h2>What the loops look like</h2>",
        "<p>These are read off while the loops run. They describe, and no verdict rests on them: a "
        "state can move without being read, and rest while it is.</p>",
        *_trace(found.dynamics.trace),
        *_blocks(found.dynamics.blocks),
        *_experts(found.dynamics.experts),
        *_lenses(found),
    ]
    return [*parts, "</section>"]


def _trace(trace: LoopTrace) -> list[str]:
    norms, steps, alike = trace.state_norm, trace.relative_step, trace.token_correlation
    alt = (
        f"Six line charts over {_loops(trace.num_loops)}. State norm from {norms[0]:.1f} to "
        f"{norms[-1]:.1f}; relative step from {steps[0]:.3f} to {steps[-1]:.3g}; token "
        f"correlation from {alike[0]:.2f} to {alike[-1]:.2f}; step ratio; turn "
        f"{_number(trace.turn[-1])} at the end; share of the step along h."
    )
    caption = (
        f"Means over {trace.num_tokens:,} tokens; h is the raw state, before any normalisation. "
        "Turn: 1 goes straight on, 0 turns by a right angle."
    )
    names = ("state_norm", "step_norm", "relative_step", "turn", "radial_fraction", "acceleration")
    head = ["loop", *(name.replace("_", " ") for name in names)]
    rows = [
        [str(loop + 1), *(_number(getattr(trace, name)[loop], 4) for name in names)]
        for loop in range(trace.num_loops)
    ]
    return [
        "<h3>The state</h3>",
        kit.figure(picture.to_svg(picture.trace_curves(trace)), "trace", alt, caption),
        f"<details><summary>As a table</summary>{kit.table(head, rows)}</details>",
    ]


def _blocks(blocks: BlockStates) -> list[str]:
    names = blocks.places
    steps = dict(zip(names, blocks.relative_step, strict=True))
    shown = _some(steps)
    chart = picture.curves_by_loop(
        shown, title="How far each place has moved since the loop before, over its norm", marks={}
    )
    ends = ", ".join(f"{name} {_number(values[-1], 3)}" for name, values in steps.items())
    moved = kit.figure(
        picture.to_svg(chart),
        "blocks",
        f"Line chart of the relative step by place; at the last loop {ends}.",
        "A place that comes to rest has a limit of its own.",
    )
    last = blocks.distance[-1]
    cells = picture.heat_map(
        last,
        [*names],
        [*map(_short, names)],
        title=f"Distance between places at loop {blocks.num_loops}",
        row_label="",
        column_label="over the mean of the two norms",
        most=max([1.0, *(v for row in last for v in row if v is not None)]),
    )
    apart = blocks.between_blocks
    alt = f"Heat map of distances between {len(names)} places of the core" + (
        f"; between blocks {apart:.2f} on average." if apart is not None else "."
    )
    between = (
        "The core has one block, so only its input and output can differ."
        if apart is None
        else f"Different blocks are {apart:.2f} of their norm apart on average."
    )
    net = _number(blocks.net_movement[-1], 3)
    caption = (
        f"{between} If places rest at different points, the state runs through a cycle; in the "
        f"last loop it gets {net} of its way further (0 is a closed cycle)."
    )
    distance = kit.figure(picture.to_svg(cells), "distance", alt, caption)
    return ["<h3>Blocks and their limits</h3>", f'<div class="pair">{moved}{distance}</div>']


def _some(curves: Mapping[str, Sequence[float | None]]) -> dict[str, Sequence[float | None]]:
    """Few enough lines to be told apart: the ends, and some between."""
    names = [*curves]
    step = max(1, -(-(len(names) - 1) // 4))
    kept = {*names[::step], names[-1]}
    return {name: values for name, values in curves.items() if name in kept}


def _short(place: str) -> str:
    return place.removeprefix("block ")


def _experts(layers: Sequence[ExpertOverlap]) -> list[str]:
    if not layers:
        return []
    parts = ["<h3>Experts</h3>"]
    for layer in layers:
        loops = [str(n + 1) for n in range(len(layer.overlap))]
        chart = picture.heat_map(
            layer.overlap,
            loops,
            loops,
            title=f"Experts that two loops share, layer {layer.layer + 1}",
            row_label="loop",
            column_label="loop; shared experts over all that either chose",
        )
        pairs = [layer.overlap[n][n + 1] for n in range(len(loops) - 1)]
        others = [layer.other_token[n][n + 1] for n in range(len(loops) - 1)]
        said = (
            f"Neighbouring loops share {_mean(pairs):.2f} for the same token and "
            f"{_mean(others):.2f} for two tokens; independent choices would share "
            f"{layer.chance:.2f}."
            if pairs
            else f"Independent choices would share {layer.chance:.2f}."
        )
        name = f"experts-{layer.layer}"
        parts.append(kit.figure(picture.to_svg(chart), name, f"Heat map. {said}", said))
    return parts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _lenses(found: Analysis) -> list[str]:
    parts = [
        "<h3>Lenses</h3>",
        "<p>The rank that the head would give a token if the loop ended with this state; 1 is the "
        "most likely. The logit lens applies the last norm and the head, the coda lens all that "
        "follows the loop. A lens shows what could be read out, not what the loop uses.</p>",
    ]
    figures = [_lens_figure(lens, found) for lens in found.lenses]
    parts.append(f'<div class="pair">{"".join(figures)}</div>')
    return [*parts, *(_lens_table(lens) for lens in found.lenses)]


def _lens_figure(lens: LensRanks, found: Analysis) -> str:
    after = {name: places[-1] for name, places in zip(lens.targets, lens.rank, strict=True)}
    way = [values for name, values in after.items() if name not in (CHOICE, ANSWER, CONTROL)]
    state = {name: after[name] for name in (CHOICE, ANSWER, CONTROL) if name in after}
    if way:
        together = zip(*way, strict=True)
        state[WAY] = tuple(_mean([v for v in each if v is not None]) for each in together)
    quiet = [name for name in state if name in (CONTROL, WAY)]
    chart = picture.curves_by_loop(
        state,
        title=f"{lens.lens.capitalize()} lens: mean rank after each loop",
        marks=marks_of(found),
        ranks=True,
        quiet=quiet,
    )
    ends = ", ".join(f"{name} {_number(values[-1], 1)}" for name, values in state.items())
    alt = f"Line chart, {lens.lens} lens, mean ranks of tokens by loops; at the end {ends}."
    caption = (
        f"Mean over {lens.num_positions:,} positions, of {lens.vocab_size:,} tokens. Grey: "
        + ("tokens on the way, all of them together, and " if way else "")
        + "the control, a token that is not to be expected."
    )
    return kit.figure(picture.to_svg(chart), f"lens-{lens.lens}", alt, caption)


def _lens_table(lens: LensRanks) -> str:
    loops = len(lens.rank[0][0])
    listed = range(loops) if loops <= MOST_LISTED else range(0, loops, -(-loops // MOST_LISTED))
    head = ["token, read after", *(f"loop {loop + 1}" for loop in listed)]
    rows = [
        [f"{target}, {place}", *(_number(lens.rank[t][p][loop], 1) for loop in listed)]
        for t, target in enumerate(lens.targets)
        for p, place in enumerate(lens.places)
    ]
    said = f"{lens.lens.capitalize()} lens after every block, as a table of mean ranks"
    return f"<details><summary>{said}</summary>{kit.table(head, rows)}</details>"


def _settings(found: Analysis) -> list[str]:
    said = ", ".join(
        f"{name.replace('_', ' ')} {value:,}" for name, value in found.settings.items()
    )
    return [
        "<footer>",
        f"<p>{escape(said)}. All numbers, with their intervals, are in "
        '<a href="analysis.json">analysis.json</a> beside this page.</p>',
        "</footer>",
    ]


# --- numbers in words -----------------------------------------------------------------------------


def _loops(count: int) -> str:
    return f"{count} loop{'' if count == 1 else 's'}"


def _number(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return UNDEFINED
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no minus before a zero


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return _number(value)
    return f"{_number(value)} ({_number(interval[0])}, {_number(interval[1])})"


def _span(interval: Interval | None, digits: int = 2) -> str:
    if interval is None:
        return "undefined"
    return (
        f"95\N{NO-BREAK SPACE}%: {_number(interval[0], digits)} to {_number(interval[1], digits)}"
    )
