import os
import signal
import threading
import time
from pathlib import Path

import pytest
import typer

from openmythos.command import reproduce
from tests.command.conftest import Invoke, refused


def test_what_is_refused(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no experiment 'x'; give one of" in refused(invoke, "reproduce", "x")
    assert "no experiment is named" in refused(invoke, "reproduce")
    assert "leave all out" in refused(invoke, "reproduce", "all", "--check")
    monkeypatch.setattr(reproduce.openmythos, "__file__", str(tmp_path / "openmythos/__init__.py"))
    assert "run this in a checkout" in refused(invoke, "reproduce", "all")


def test_modules_are_run_in_the_checkout(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(reproduce, "_run", lambda root, *words: ran.append(words) or 0)
    invoke("reproduce", "--check")
    assert ran == [("experiments.check",)]


def test_a_signal_ends_the_module_too(tmp_path: Path) -> None:
    """And what would follow it: a scheduler's SIGTERM is no reason to begin the next experiment."""
    ready = tmp_path / "ready"
    code = "import os, pathlib, time\n"
    code += f"pathlib.Path({str(ready)!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    (tmp_path / "waiting.py").write_text(code)

    def stop() -> None:
        while not (ready.is_file() and ready.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(typer.Exit) as ended:
        reproduce._run(tmp_path, "waiting")
    assert ended.value.exit_code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert reproduce._run(tmp_path, "absent_module") == 1
