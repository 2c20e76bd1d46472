"""The style that all pictures share, and the pictures of a trace; matplotlib is loaded on use.

Blue is what was measured at a given depth, orange the depth that the model chose, grey is context.
Pictures stay readable in greyscale and for colour-blind readers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from openmythos.analysis.trace import LoopTrace
from openmythos.folder import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page in light mode: the first four are for text on PAPER and BAND, INK also on CELL.
INK, MUTED, BLUE, ORANGE = "#1f2733", "#5f6977", "#1f5fa8", "#ab4d08"
GRID, BAND, PAPER, CELL = "#dde1e7", "#eef0f4", "#ffffff", "#5f9be0"
STYLE: dict[str, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 2.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "openmythos",
}
DPI = 200


def require_matplotlib() -> None:
    """Check that matplotlib is installed, to fail early rather than after minutes of training.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            'pictures need matplotlib, which is not installed; run: pip install "openmythos[plot]"'
        ) from error


# --- drawing -------------------------------------------------------------------------------------

OFF: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


def styled() -> Any:
    """The matplotlib style context in which pictures are made and saved."""
    require_matplotlib()
    import matplotlib

    return matplotlib.rc_context(cast(Any, STYLE))


def figure_of(width: float, height: float) -> Figure:
    """An empty picture of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI)


def save(figure: Figure, path: Path, words: Mapping[str, str] | None = None) -> None:
    """Write a picture, and ``words`` into its file; the suffix chooses the format."""
    with styled(), whole_file(path) as file:
        kept = None if words is None else dict(words)
        figure.savefig(
            file, format=path.suffix[1:], dpi=DPI, facecolor=PAPER, metadata=cast(Any, kept)
        )


def to_svg(figure: Figure) -> str:
    """The picture as SVG text, with a transparent background and no date."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


# --- where labels go, so that they hide no data and no line --------------------------------------

ENDS = (("left", 1), ("right", 1), ("left", -1), ("right", -1))


def label_place(curve: Mapping[int, float], loops: int, flat: float) -> tuple[int, int]:
    """On which side of a point its label hides no part of the curve.

    Args:
        curve: Values by number of loops.
        loops: The number of loops of the point.
        flat: Changes of the value up to this one count as level.

    Returns:
        -1, 0 or 1 for left, centred or right; and 1 or -1 for above or below.
    """
    keys, value = sorted(curve), curve[loops]
    i = keys.index(loops)
    falls = curve[keys[max(i - 1, 0)]] - value > flat
    rises = curve[keys[min(i + 1, len(keys) - 1)]] - value > flat
    if falls and rises:
        return 0, -1
    return int(falls) - int(rises), 1


def roomiest_end(values: Sequence[float], height: float, lift: float) -> tuple[str, int]:
    """The end of a horizontal line at which its label has most room.

    Args:
        values: The data in the same picture, from left to right.
        height: Height of the line, in the data's unit.
        lift: Distance of the label from the line, in the data's unit.

    Returns:
        "left" or "right", and 1 or -1 for above or below the line.
    """
    half = len(values) // 2

    def room(end: tuple[str, int]) -> float:
        part = values[:half] if end[0] == "left" else values[half:]
        return min((abs(value - height - end[1] * lift) for value in part), default=1.0)

    return max(ENDS, key=room)


# --- the state -----------------------------------------------------------------------------------


def trace_curves(trace: LoopTrace) -> Figure:
    """State norm, relative step, step ratio with rho(A), token correlation, turn, radial part."""
    with styled():
        figure = figure_of(5.8, 6.2)
        panels = figure.subplots(3, 2)
        figure.subplots_adjust(0.07, 0.08, 0.98, 0.95, wspace=0.22, hspace=0.46)
        loops = list(range(1, trace.num_loops + 1))
        ratios = _numbers(trace.step_ratio)
        _small(panels[0, 0], loops, trace.state_norm, "State norm |h|")
        _small(panels[0, 1], loops, trace.relative_step, "Relative step |Δh| / |h|")
        _small(panels[1, 0], loops, ratios, "Step over the step before")
        _small(panels[1, 1], loops, trace.token_correlation, "Token correlation")
        _small(panels[2, 0], loops, _numbers(trace.turn), "Turn: cosine with the step before")
        _small(panels[2, 1], loops, _numbers(trace.radial_fraction), "Share of the step along h")
        below, alike = panels[1]
        known = [value for value in ratios if math.isfinite(value)]
        below.set_ylim(0, 1.15 * max([1.0, *known]))
        below.axhline(1.0, color=MUTED, linewidth=1)
        _note(below, 1.0, "1: no shrinking", MUTED, known)
        if trace.rho is not None:
            below.axhline(trace.rho, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            taken = [1.1, *known, 1.1]  # the label of the other line is drawn above 1
            _note(below, trace.rho, f"rho(A) {trace.rho:.2f}, A alone", INK, taken)
        alike.axhline(1.0, color=MUTED, linewidth=1)
        for axes, values in ((alike, trace.token_correlation), (panels[2, 0], trace.turn)):
            axes.set_ylim(min([0.0, *_finite(values)]) - 0.02, 1.15)
        panels[2, 1].set_ylim(0, 1.05)
        _note(alike, 1.0, "1: all tokens alike", MUTED, ())
        for axes in panels[2]:
            axes.set_xlabel("loop")
    return figure


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _note(axes: Axes, height: float, text: str, colour: str, values: Sequence[float]) -> None:
    """Label a horizontal line where the values leave most room."""
    side, up = roomiest_end(values, height, lift=0.08 * axes.get_ylim()[1])
    place, offset = (0.02 if side == "left" else 0.98, height), (0, 3 if up > 0 else -10)
    style: dict[str, Any] = {"color": colour, "fontsize": 8.5, "ha": side, "zorder": 1, **OFF}
    axes.annotate(text, place, offset, xycoords=("axes fraction", "data"), **style)


def _small(axes: Axes, loops: Sequence[int], values: Sequence[float], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.plot(loops, values, color=BLUE, marker="o", markersize=3.2, linewidth=1.6)
    axes.set_title(title, fontsize=9.5)
    axes.set_xlim(0.5, loops[-1] + 0.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]))


# --- instruments ---------------------------------------------------------------------------------

CELL_WIDTH, CELL_HEIGHT = 0.52, 0.36  # inches
MOST_NUMBERED = 16  # columns or rows of cells that have room for numbers


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_label: str,
    column_label: str,
    most: float = 1.0,
) -> Figure:
    """A table of cells: the stronger the blue, the nearer to ``most``; a dot where undefined.

    Args:
        values: By row and column.
        rows: The rows' names.
        columns: The columns' names.
        title: What is shown.
        row_label: What the rows are.
        column_label: What the columns are.
        most: The value of the strongest blue.
    """
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    width = min(CELL_WIDTH, 7.5 / len(columns))
    height = min(CELL_HEIGHT, 8.0 / len(rows))
    numbered = max(len(rows), len(columns)) <= MOST_NUMBERED
    left, right, top, bottom = 0.45 + 0.075 * max(map(len, rows)), 0.1, 0.78, 0.08
    inner = (width * len(columns), height * len(rows))
    # A narrow picture would be drawn larger than the others of the page.
    size = (max(left + inner[0] + right, 0.085 * len(title) + 0.1, 5.0), top + inner[1] + bottom)
    with styled():
        figure = figure_of(*size)
        box = (left / size[0], bottom / size[1], inner[0] / size[0], inner[1] / size[1])
        axes = figure.add_axes(box)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axis("off")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                known = value is not None and math.isfinite(value)
                share = min(max((value or 0.0) / most, 0.0), 1.0) if known else 0.0
                colour = to_rgba(CELL, 0.04 + 0.92 * share)
                axes.add_patch(Rectangle((x - 0.475, y - 0.46), 0.95, 0.92, fc=colour, lw=0))
                if numbered or not known:
                    said = two_digits(value) if known and value is not None else "·"
                    axes.text(x, y, said, ha="center", va="center", fontsize=9, color=INK)
        step = 1 if numbered else 4
        small: dict[str, Any] = {"color": MUTED, "fontsize": 8.5, "va": "center"}
        for y in range(0, len(rows), step):
            axes.text(-0.62, y, rows[y], ha="right", va="center", clip_on=False)
        for x in range(0, len(columns), step):
            at, side = (x, "center") if numbered else (x - 0.5 + 0.06 / width, "left")
            named: dict[str, Any] = {"ha": side, "va": "center", "fontsize": 9, "clip_on": False}
            axes.text(at, -0.5 - 0.14 / height, columns[x], **named)
        axes.text(-0.62, -0.5 - 0.14 / height, row_label, ha="right", **small)
        axes.text(-0.5, -0.5 - 0.36 / height, column_label, ha="left", **small)
        figure.text(0.02, 1 - 0.16 / size[1], title, weight="bold", fontsize=10.5, va="center")
    return figure


def two_digits(value: float) -> str:
    """Two digits in as few characters as possible: .07, -.12, 1.0, 12."""
    if abs(value) >= 0.995:
        return f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"
    said = f"{value:.2f}".replace("0.", ".")
    return ".00" if said == "-.00" else said


def curves_by_loop(
    curves: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    marks: Mapping[str, int],
    ranks: bool = False,
    quiet: Sequence[str] = (),
) -> Figure:
    """Lines over loops, named at their ends.

    Args:
        curves: By name: a value for every loop from 1; None leaves a gap.
        title: What is shown.
        marks: Numbers of loops that are marked, by what they are.
        ranks: Whether the values are ranks, on a logarithmic axis.
        quiet: The names of lines that are only context, in grey.
    """
    from matplotlib.ticker import MaxNLocator

    with styled():
        figure = figure_of(5.8, 3.3)
        axes = figure.add_axes((0.085, 0.14, 0.89, 0.745))
        ends: dict[str, tuple[int, float]] = {}
        for name, values in curves.items():
            grey = name in quiet
            style: dict[str, Any] = {"color": MUTED if grey else BLUE, "alpha": 0.7 if grey else 1}
            numbers = _numbers(values)
            loops = list(range(1, len(numbers) + 1))
            dash: Any = _DASHES[len([n for n in ends if n not in quiet]) % len(_DASHES)]
            axes.plot(
                loops,
                numbers,
                linewidth=1.1 if grey else 1.9,
                linestyle=(0, (1, 1.6)) if grey else dash,
                marker=None if grey else "o",
                markersize=3.2,
                **style,
            )
            last = [(n, v) for n, v in zip(loops, numbers, strict=True) if math.isfinite(v)]
            if last:
                ends[name] = last[-1]
        most = max((len(values) for values in curves.values()), default=1)
        known = [v for values in curves.values() for v in _finite(values)]
        _set_heights(axes, known, ranks)
        axes.set_xlim(0.7, most + max(1.0, 0.3 * most))
        _name_ends(axes, ends, ranks)
        for number, (name, loops_at) in enumerate(marks.items()):
            axes.axvline(loops_at, color=ORANGE, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
            place, under = (loops_at, 1.0), -2 - 11 * number
            axes.annotate(
                name,
                place,
                (-3, under),
                xycoords=("data", "axes fraction"),
                ha="right",  # lines are named on the other side
                color=ORANGE,
                fontsize=8.5,
                va="top",
                **OFF,
            )
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]))
        ticks = [tick for tick in axes.get_xticks() if 1 <= tick <= most]
        axes.set_xticks(ticks)
        axes.set_xlabel("loop")
        axes.set_title(title)
    return figure


_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 1, 2)))


def _set_heights(axes: Axes, known: Sequence[float], ranks: bool) -> None:
    if ranks:
        from matplotlib.ticker import FuncFormatter, LogLocator

        axes.set_yscale("log")
        axes.set_ylim(0.85, 1.5 * max([2.0, *known]))
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.minorticks_off()
        return
    low, high = min([0.0, *known]), max(known, default=1.0)
    room = 0.22 * ((high - low) or 1.0)  # for the names of marks
    axes.set_ylim(low if low == 0 else low - 0.3 * room, high + room)
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high + 0.02 * room])


def _name_ends(axes: Axes, ends: Mapping[str, tuple[int, float]], ranks: bool) -> None:
    """Name each line at its right end, at a distance from the next name."""
    change = math.log if ranks else float
    low, high = (change(value) for value in axes.get_ylim())
    gap, height = 0.062 * (high - low), -math.inf
    for name, (loop, value) in sorted(ends.items(), key=lambda item: item[1][1]):
        height = max(change(value), height + gap)
        place = (loop, math.exp(height) if ranks else height)
        axes.annotate(name, place, (7, 0), color=INK, fontsize=8.5, va="center", **OFF)
