from pathlib import Path

import pytest

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
