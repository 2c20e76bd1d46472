"""Tables of numbers in a terminal: names on the left, counts with their units on the right."""

from rich.console import Console
from rich.table import Table

TABLE_WIDTH = 100  # characters, where the output is no terminal


def wide_console() -> Console:
    """A console that keeps a table's width where the output is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console


def number_table(*columns: str, title: str | None = None) -> Table:
    """The first column holds names, the others numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        is_name = column == columns[0]
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    return table


def human_count(number: int) -> str:
    """Three digits and a power of a thousand: 1.06B."""
    return _scaled(number, 1000, ["", "K", "M", "B", "T"])


def human_flops(number: int) -> str:
    """Three digits and a power of a thousand: 12.3 GFLOP."""
    return _scaled(number, 1000, [" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"])


def human_bytes(number: int) -> str:
    """Three digits and a power of 1024: 1.20 KiB."""
    return _scaled(number, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"])


def _scaled(number: int, step: int, units: list[str]) -> str:
    value, power = float(number), 0
    # What would round to four digits belongs to the next unit.
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / step, power + 1
    decimals = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}{units[power]}"
