"""What is printed: text as it was given, and nothing wrapped or dropped where it is piped."""

import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDE = 100_000  # characters; a table is as wide as its contents, so this only removes the limit


def console(*, notes: bool = False) -> Console:
    """A console that prints text as it is: users' brackets are no markup.

    In a terminal it has the terminal's width; elsewhere no line is broken.

    Args:
        notes: Print to standard error, for what is not the command's answer.
    """
    made = Console(stderr=notes, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = WIDE
    return made


def print_table(target: Console, table: Table) -> None:
    """Print a table with all its columns; a terminal that is too narrow wraps the lines itself."""
    options = target.options.update(max_width=WIDE)
    needed = Measurement.get(target, options, table).maximum
    before, target.width = target.width, max(target.width, needed)
    try:
        target.print(table)
    finally:
        target.width = before


def note(text: str) -> None:
    """Say in a line on standard error what happens now; loads nothing that takes time."""
    print(text, file=sys.stderr, flush=True)
