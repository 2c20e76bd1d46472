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
    """State norm, relative step, step ratio with rho(A), and token correlation, over loops."""
    with styled():
        figure = figure_of(5.8, 4.3)
        panels = figure.subplots(2, 2)
        figure.subplots_adjust(0.07, 0.11, 0.98, 0.93, wspace=0.22, hspace=0.46)
        loops = list(range(1, trace.num_loops + 1))
        _small(panels[0, 0], loops, trace.state_norm, "State norm |h|")
        _small(panels[0, 1], loops, trace.relative_step, "Relative step |Δh| / |h|")
        ratios = [float("nan") if value is None else value for value in trace.step_ratio]
        _small(panels[1, 0], loops, ratios, "Step over the step before")
        _small(panels[1, 1], loops, trace.token_correlation, "Token correlation")
        below, alike = panels[1, 0], panels[1, 1]
        known = [value for value in ratios if math.isfinite(value)]
        below.set_ylim(0, 1.15 * max([1.0, *known]))
        below.axhline(1.0, color=MUTED, linewidth=1)
        _note(below, 1.0, "1: no shrinking", MUTED, known)
        if trace.rho is not None:
            below.axhline(trace.rho, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            taken = [1.1, *known, 1.1]  # the label of the other line is drawn above 1
            _note(below, trace.rho, f"rho(A) {trace.rho:.2f}, A alone", INK, taken)
        alike.set_ylim(min(0.0, *trace.token_correlation) - 0.02, 1.15)
        alike.axhline(1.0, color=MUTED, linewidth=1)
        _note(alike, 1.0, "1: all tokens alike", MUTED, ())
        for axes in panels[1]:
            axes.set_xlabel("loop")
    return figure


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
