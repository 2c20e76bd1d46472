"""How the C++ kernels are built."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from openmythos.ops.cpu import build as native


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "echo 'narrow.cpp:1: error: no such thing' >&2; echo '  ^~~~' >&2; exit 1",
            "no such thing",
        ),
        ("echo ' ' >&2; exit 3", "exit status 3"),
    ],
)
def test_a_compiler_that_fails_costs_one_warning(monkeypatch, tmp_path, text, reason):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "libraries"))
    monkeypatch.setenv("CXX", script(tmp_path, text))
    with pytest.warns(UserWarning, match=rf"narrow.cpp could not be built with .*{reason}"):
        assert not native._load.__wrapped__("narrow")
    assert list((tmp_path / "libraries" / "openmythos").iterdir()) == []


def test_without_a_compiler_nobody_expects_it(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.find_compiler() is None
    assert not native._load.__wrapped__("narrow")
    monkeypatch.setenv("CXX", "gone -O2")
    assert native.find_compiler() is None
    with pytest.raises(ValueError, match=r"it must be False without a C\+\+ compiler"):
        native.require_compiler("compiled", True)


def test_threads_that_load_the_same_kernel_build_it_once(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "libraries"))
    calls = tmp_path / "calls"
    build = f"echo called >> {calls}; sleep 0.2; for last; do :; done; echo built > $last"
    monkeypatch.setenv("CXX", script(tmp_path, build))
    said = []
    monkeypatch.setattr(native, "note", lambda text: said.append((text, calls.exists())))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(native.load, ["narrow"] * 4))
    assert calls.read_text(encoding="utf-8") == "called\n"
    assert said == [
        ("building kernels of narrow for this CPU, once ...", False)
    ]  # said before it is done
    native._load.__wrapped__("narrow")
    assert len(said) == 1  # it is there now


def test_single_kernels_are_switched_off(compiler, monkeypatch):
    x = torch.zeros(2, 32)
    assert native.takes("experts", x)
    monkeypatch.setenv(native.OFF, "attention,experts")
    assert not native.takes("experts", x)
    assert not native.load("attention")
    assert native.load("narrow")
    monkeypatch.setenv(native.OFF, "attentoin")
    with pytest.raises(ValueError, match="OPENMYTHOS_KERNELS_OFF is 'attentoin'; it must be names"):
        native.load("narrow")


def test_what_is_not_plain_fp32_with_rows_is_left_to_torch(compiler):
    x = torch.zeros(2, 32)
    assert not native.takes("experts", x.double())
    assert not native.takes("experts", x, torch.zeros(32, dtype=torch.bfloat16))
    assert not native.takes("experts", x[:0])


def test_a_library_is_of_one_processor_one_torch_and_its_sources(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    here = native.library("narrow", ["c++"])
    assert here.parent == tmp_path / "openmythos"
    assert native.library("narrow", ["c++"]) == here != native.library("narrow", ["g++"])
    assert native.library("experts", ["c++"]) != here
    monkeypatch.setattr(native, "processor", lambda: "another")
    assert native.library("narrow", ["c++"]) != here
