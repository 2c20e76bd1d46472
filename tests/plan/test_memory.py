from pathlib import Path

import pytest

from openmythos.plan import memory


def test_free_bytes_of_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\nSwapFree: 2 kB\nHugePages: 0\n")
    monkeypatch.setattr(memory, "MEMINFO", info)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes() == 6 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() == 6 * 1024
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.free_bytes() == 1000
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    assert (memory.free_bytes() or 1) > 0


def test_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 2**31)
    memory.require_memory(2**31, "this", "")
    with pytest.raises(ValueError, match=r"^this needs 3.0 GiB of memory .* 2.0 GiB free; rest$"):
        memory.require_memory(3 * 2**30, "this", "rest")
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    memory.require_memory(2**80, "this", "")
    assert memory.in_words(10) == "10 bytes"
    assert memory.in_words(2**60) == "1024.0 PiB"
    assert memory.in_words(10**400).endswith("PiB")
