"""The scripts of ``examples/``: short, and each runs as its docstring says."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import openmythos as om
from docs.page_code import GUIDE
from openmythos.tokenizer import byte_tokenizer
from tests.serve.running import running
from tests.strategies import random_model, small_config
from tests.test_repo_rules import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 60


def run(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
) -> str:
    script = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out


def test_examples_are_short_and_the_guide_links_to_each() -> None:
    assert len(SCRIPTS) == 5
    guide = "".join((ROOT / page).read_text(encoding="utf-8") for page in GUIDE)
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_LINES, script.name
        assert f"(../../examples/{script.name})" in guide
        assert f"\npython examples/{script.name} " in text


def test_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = ROOT / "docs/questions.md", tmp_path / "run"
    said = run("train", monkeypatch, capsys, text, "--out", out, "--steps", "1", "--width", "32")
    bits = [float(found) for found in re.findall(r"loops: (\d\.\d{3}) bits per byte", said)]
    assert len(bits) == 4
    assert json.loads((out / "config.json").read_text())["train"]["max_steps"] == 1


def test_generate_with_exits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["zoo:text", "The loop", "A list", "--max-new-tokens", "3"]
    said = run("generate_with_exits", monkeypatch, capsys, *arguments).splitlines()
    assert [line.split(":")[0] for line in said if line.startswith("loops")] == [
        "loops of each token",
        "loops of each token",
    ]
    depths = [int(word) for word in said[-1].split(":")[1].split()]
    assert len(depths) == 3
    assert 1 <= min(depths) <= max(depths) <= 8


def test_trace_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "trace.png"
    arguments = ["zoo:text", "The loop", "--num-loops", "3", "--picture", picture]
    rows = run("trace_loop", monkeypatch, capsys, *arguments).splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert picture.is_file()


def test_retrofit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    config = small_config(vocab_size=tokenizer.vocab_size, num_core_layers=3).unlooped()
    plain = random_model(replace(config, num_prelude_layers=0, num_coda_layers=0), seed=0)
    om.save_pretrained(plain, tmp_path / "plain", tokenizer)
    arguments = [tmp_path / "plain", "--prelude", "1", "--coda", "1", "--out", tmp_path / "looped"]
    said = run("retrofit", monkeypatch, capsys, *arguments)
    off = [float(found) for found in re.findall(r"differ by (\S+) from", said)]
    assert len(off) == 2
    assert max(off) < 1e-5
    assert om.load_pretrained(tmp_path / "looped").config.num_prelude_layers == 1


def test_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with running() as server:
        (model,) = (served.name for served in server.served)
        arguments = [model, "The loop", "--num-loops", "3", "--max-tokens", "4"]
        said = run("client", monkeypatch, capsys, *arguments, "--url", server.url)
    assert said.startswith("The loop")
    assert re.search(r"'max': 3", said)
