"""``openmythos config``: every field of a run's configuration, and what it means."""

import difflib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from openmythos.command.option import AsJson
from openmythos.terminal import console, note, print_table

if TYPE_CHECKING:
    from openmythos.config.fields import FieldDoc


def config(
    part: Annotated[
        str | None, typer.Argument(help="model, train, data, or a part such as train.depth.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the fields that `train --set` takes: type, default and meaning.

    The defaults are those of `openmythos train` with nothing said; presets set their own. `inspect
    --set` takes those of model, without that word; `demo --set` has text. and hops. before them.
    """
    note("reading the fields ...")
    shown = fields_below(part)
    if as_json:
        typer.echo(json.dumps({"fields": [asdict(each) for each in shown]}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("field", no_wrap=True)
    for heading in ("default", "type", "meaning"):
        table.add_column(heading, overflow="fold")
    for each in shown:
        owner = f"With {each.kind}: " if each.kind else ""
        table.add_row(each.name, in_words(each.default), each.type, owner + each.meaning)
        for kind, meaning in each.choices.items():
            table.add_row(f"{each.name}={kind}", "", "", meaning)
    screen = console()
    if screen.is_terminal:
        screen.print(table)  # long meanings go on below themselves
    else:
        print_table(screen, table)


def fields_below(part: str | None) -> "list[FieldDoc]":
    """The fields of a part of a run's configuration; all of them if it is None.

    Raises:
        ValueError: There is no such part; names the nearest one.
    """
    from openmythos.config.fields import fields_of
    from openmythos.train.recipe import RunConfig
    from openmythos.train.run import resolve

    whole = fields_of(RunConfig, used=resolve(None, None, None, []))
    shown = [each for each in whole if part is None or f"{each.name}.".startswith(f"{part}.")]
    if not shown:
        names = [each.name for each in whole]
        ends = [name for name in names if name.endswith(f".{part}")]
        near = ends or difflib.get_close_matches(str(part), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; give model, train, data or a part"
        raise ValueError(f"no field {part!r}{hint}")
    return shown


def in_words(value: Any) -> str:
    """A default as `--set` would write it."""
    return value if isinstance(value, str) else json.dumps(value)
