"""One run in a process of its own, with one thread.

The parent writes ``run.json`` into the run's folder and starts the study's module with ``--one``;
the process writes ``result.json`` beside it. A parent that was killed in between finds it there
later.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from experiments.run_store import Result, Run
from openmythos.folder import locked, write_json

if TYPE_CHECKING:
    from experiments.study import Study

ROOT = Path(__file__).parent.parent
RUN_FILE, RESULT_FILE = "run.json", "result.json"


class OwnProcess:
    """A run that has been started; its folder survives a kill, and a next start goes on in it."""

    def __init__(self, study: Study, run: Run, scale: str, out: Path) -> None:
        self.run, self.out, self.started = run, out, time.perf_counter()
        self.errors: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self.process: subprocess.Popen[bytes] | None = None
        if (out / RESULT_FILE).is_file():
            return
        write_json(out / RUN_FILE, asdict(run))
        # Its standard input ends with this process, however that ends; then it ends, too.
        self.process = subprocess.Popen(
            [sys.executable, "-m", study.module, "--scale", scale, "--one", str(out)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.perf_counter() - self.started

    def ended(self) -> Result | None:
        """Its result once it has ended."""
        status = 0 if self.process is None else self.process.poll()
        if status is None:
            return None
        said = self._last_words()
        path = self.out / RESULT_FILE
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
            return Result(run=self.run, **found)
        reason = f"killed by signal {-status}" if status < 0 else f"status {status}: {said}"
        return Result(self.run, {}, reason, self.seconds, 0.0, processor(), _torch_version())

    def stop(self) -> None:
        """End the process; a training saves its checkpoint first."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self._last_words()

    def _last_words(self) -> str:
        """The last line that the process printed as an error; what it was given is closed."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        with self.errors:
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def measure_here(study: Study, scale: str, out: Path) -> None:
    """What the run's own process does: measure, and write the result or why it is lost.

    ``OMP_NUM_THREADS`` has given it one thread.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run = Run(**json.loads((out / RUN_FILE).read_text(encoding="utf-8")))
    data, lost, started = {}, None, time.perf_counter()
    try:
        with locked(out):  # so that a next parent waits until this process has ended
            data = study.measure(run, scale, out)
    except Exception as error:
        traceback.print_exc()
        # Results are committed, and a folder of this machine means nothing elsewhere.
        lost = f"{type(error).__name__}: {error}".replace(f"{out}/", "")
    result = {
        "data": data,
        "lost": lost,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "processor": processor(),
        "torch": _torch_version(),
    }
    write_json(out / RESULT_FILE, result)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # a buffer's lock would be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return named[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _torch_version() -> str:
    return importlib.metadata.version("torch")  # a study without torch does not wait for it
