"""Tables of numbers in a terminal: names on the left, counts with their units on the right."""

from rich.table import Table


def number_table(*columns: str, title: str | None = None) -> Table:
    """An empty table: the first column holds names, the others numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        is_name = column == columns[0]
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    return table


def human_count(number: int) -> str:
    """A count with three digits and a unit, powers of 1000: 1.06B."""
    return _scaled(number, 1000, ["", "K", "M", "B", "T"])


def human_flops(number: int) -> str:
    """FLOPs with three digits and a unit, powers of 1000: 12.3 GFLOP."""
    return _scaled(number, 1000, [" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"])


def human_bytes(number: int) -> str:
    """Bytes with three digits and a unit, powers of 1024: 1.20 KiB."""
    return _scaled(number, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"])


def _scaled(number: int, step: int, units: list[str]) -> str:
    value, power = float(number), 0
    # A value that would round to four digits gets the next unit.
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / step, power + 1
    decimals = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}{units[power]}"
