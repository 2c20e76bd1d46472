"""One run in a process of its own, with one thread.

The parent writes ``run.json`` into the run's folder; the process writes ``result.json`` beside it.
A parent that was killed in between finds it there later.

On Linux the processes are forks of one that has loaded what they need: torch alone takes longer to
load than a few steps to run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.run_store import Result, Run
from openmythos.folder import locked, write_json

if TYPE_CHECKING:
    from experiments.study import Study

ROOT = Path(__file__).parent.parent
RUN_FILE, RESULT_FILE, ERRORS_FILE = "run.json", "result.json", "errors.txt"
FORKS = sys.platform == "linux"  # elsewhere libraries that are loaded may not survive a fork
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")


class OwnProcess:
    """A run that has been started; its folder survives a kill, and a next start goes on in it."""

    def __init__(self, study: Study, run: Run, scale: str, out: Path) -> None:
        self.run, self.out, self.started = run, out, time.perf_counter()
        self.process: multiprocessing.process.BaseProcess | None = None
        if (out / RESULT_FILE).is_file():
            return
        write_json(out / RUN_FILE, asdict(run))
        if FORKS:
            CONTEXT.set_forkserver_preload(list(study.loads))
        self.process = CONTEXT.Process(target=measure_here, args=(study.module, scale, out))
        with _one_thread():
            self.process.start()

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.perf_counter() - self.started

    def ended(self) -> Result | None:
        """Its result once it has ended."""
        status = 0 if self.process is None else self.process.exitcode
        if status is None:
            return None
        path = self.out / RESULT_FILE
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
            return Result(run=self.run, **found)
        reason = f"status {status}: {self._last_words()}"
        if status < 0:
            reason = f"killed by signal {-status}"
        return Result(self.run, {}, reason, self.seconds, 0.0, processor(), _torch_version())

    def stop(self) -> None:
        """End the process; a training saves its checkpoint first."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate()
            self.process.join(timeout=10)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()

    def _last_words(self) -> str:
        """The last line that the process printed as an error."""
        try:
            lines = (self.out / ERRORS_FILE).read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            lines = []
        return lines[-1] if lines else ""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that start inside have one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def measure_here(module: str, scale: str, out: Path) -> None:
    """What the run's own process does: measure, and write the result or why it is lost.

    Args:
        module: The study's.
        scale: The scale.
        out: The run's folder; also what is printed as an error goes there.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(ROOT)
    _redirect(out / ERRORS_FILE)
    study: Study = importlib.import_module(module).STUDY
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


def _redirect(errors: Path) -> None:
    """Send what is printed as an error to a file, and all else nowhere."""
    with errors.open("wb") as file, Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), sys.__stdout__.fileno())
        os.dup2(file.fileno(), sys.__stderr__.fileno())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
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
