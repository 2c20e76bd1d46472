import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from openmythos.cli import app
from openmythos.command import demo
from openmythos.demo import text as demo_text
from openmythos.demo import walks as demo_hops
from openmythos.train.metrics import read_metrics
from tests.command.conftest import SMALL, Invoke, refused, sets


def of(act: str, *overrides: str) -> list[str]:
    return [f"{act}.{override}" for override in overrides]


@pytest.mark.slow
def test_demo_from_end_to_end(
    invoke: Invoke, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_hops, "NUM_WALKS", 16)
    monkeypatch.setattr(demo_hops, "HOPS", (1, 4, 8, 10))
    monkeypatch.setattr(demo_hops, "LOOPS", (1, 2, 8, 16))
    monkeypatch.setattr(demo_text, "NEW_TOKENS", 8)
    model = [word for word in SMALL if word.startswith("model.")]
    small_text = of("text", *model, f"data.source={text_file}", "data.seq_len=32")
    small_hops = of("hops", "model.d_model=16", "train.batch_size=16")
    out = tmp_path / "demo"
    command = [
        *("demo", "--out", out, "--text-seconds", 2, "--hops-seconds", 2, "--seed", 1, "--json"),
        *sets(*small_text, *small_hops),
    ]
    result = CliRunner().invoke(app, [str(word) for word in command])
    report, said = json.loads(result.stdout), result.stderr
    assert report["report"] == str(out / "report.html") and len(report["takeaways"]) == 2
    for name in ("depth_curve.png", "hops_grid.png", "report.html"):
        assert (out / name).stat().st_size > 1000
        assert name in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "held-out text" in said and "bits per byte" in said and "never trained; chance" in said
    runs: dict[str, Any] = {}
    for act in ("text", "hops", "hops_original_halting"):
        rows = [row for row in read_metrics(out / act / "metrics.jsonl") if row["kind"] == "train"]
        runs[act] = rows
        *before, last = (row["seconds"] for row in rows)
        assert last >= 2 and all(seconds < 2 for seconds in before)
        assert list((out / act / "checkpoints").iterdir())
    stored = json.loads((out / "hops_original_halting" / "config.json").read_text(encoding="utf-8"))
    assert stored["model"]["halting"]["kind"] == "act"
    assert not stored["model"]["halting"]["keep_remainder"]
    assert runs["hops"][0]["loss"] < 10
    assert "is not empty" in refused(invoke, "demo", "--out", out)


def test_overrides_belong_to_an_act(invoke: Invoke, tmp_path: Path) -> None:
    text, hops = demo.configs(3, 1.0, 2.0, ["text.model.num_loops=3", "hops.train.batch_size=64"])
    assert text.model.num_loops == 3 and hops.train.batch_size == 64
    assert (text.train.max_seconds, hops.train.max_seconds) == (1.0, 2.0)
    assert text.train.seed == hops.train.seed == 3
    message = refused(invoke, "demo", "--out", tmp_path / "x", *sets("model.num_loops=3"))
    assert "unknown key 'model'" in message
    assert not (tmp_path / "x").exists()


def test_the_first_free_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.free_folder(None) == Path("runs/demo")
    Path("runs/demo").mkdir(parents=True)
    assert demo.free_folder(None) == Path("runs/demo-2")
    assert demo.free_folder(Path("runs/demo")) == Path("runs/demo")  # it is empty
    (Path("runs/demo") / "file").touch()
    with pytest.raises(ValueError, match="is not empty; choose another --out"):
        demo.free_folder(Path("runs/demo"))


PROGRAM = """
import ctypes, resource, sys
from openmythos.command.demo import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def touch():
    memory = libc.malloc(48_000_000)  # 11,719 pages
    libc.memset(memory, 1, 48_000_000)
    libc.free(memory)

if sys.argv[1] == "keep":
    assert keep_freed_memory()
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_is_used_again() -> None:
    def pages(what: str) -> int:
        command = [sys.executable, "-c", PROGRAM, what]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert pages("keep") < 100 < 10_000 < pages("default")
