import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openmythos.cli import app
from openmythos.command import chat


def test_chat_over_a_pipe(text_run: Path) -> None:
    lines = ["the list", "", "/loops 2", "a value", "/loops 99", "/what", "/reset", "/[/x]", "[/x]"]
    command = [sys.executable, "-m", "openmythos", "chat", str(text_run), "--max-new-tokens", "6"]
    ran = subprocess.run(
        command,
        input="\n".join(lines) + "\n",
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stderr.count("> ") >= len(lines)
    assert ran.stderr.count("give /loops 1..16") == 3
    assert "'/loops 99'" in ran.stderr and "'/[/x]'" in ran.stderr
    assert "/loops" not in ran.stdout and ran.stdout.strip()


def test_chat_goes_on_when_the_context_is_full(text_run: Path) -> None:
    long_line, too_long = "the " * 20, "the function " * 60
    ran = CliRunner().invoke(
        app,
        ["chat", str(text_run), "--max-new-tokens", "30"],
        input=f"{long_line}\n{long_line}\n{too_long}\n/quit\n",
    )
    assert ran.exit_code == 0
    assert "the context is full; starting again" in ran.stderr
    assert "too long for this model" in ran.stderr


def test_depth_is_read_from_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    console = Console()
    assert chat.read_depth(console, "/loops 3", 4, 8) == 3
    for line in ("/loops", "/loops 9", "/loops 0", "/loops x", "/loop 3", "/loops 1 2"):
        assert chat.read_depth(console, line, 4, 8) == 4
    assert capsys.readouterr().out.count("give /loops 1..8") == 6
