import io

import pytest
from rich.console import Console
from rich.table import Table

from openmythos.terminal import console, note, print_table


def wide_table() -> Table:
    table = Table(title="[b]scores[/x] of a title that is longer than the table is wide")
    for number in range(40):
        table.add_column(f"column {number}")
    table.add_row(*(f"[b]{number}" for number in range(40)))
    return table


def test_users_words_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "/[/x] [b]bold[/b] :smile: " + "word " * 200
    console().print(text)
    console(notes=True).print(text)
    assert capsys.readouterr() == (f"{text}\n", f"{text}\n")
    note("[/x]")
    assert capsys.readouterr() == ("", "[/x]\n")


def test_no_column_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table(console(), wide_table())
    said = capsys.readouterr().out
    assert "[b]39" in said and "column 39" in said
    row = next(line for line in said.splitlines() if "[b]0 " in line)
    assert "[b]39" in row
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=40, markup=False, soft_wrap=True)
    print_table(terminal, wide_table())
    assert "[b]39" in file.getvalue()
    assert terminal.width == 40
